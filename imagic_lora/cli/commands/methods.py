"""The command ``methods``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.table import Table

from ...core.errors import ImagicError
from ..console import out, plain, print_columns, print_json
from ..libraries import import_libraries
from ..options import Json

if TYPE_CHECKING:
    from ...methods.method import Need


def methods(name: str | None = None, *, as_json: Json = False) -> None:
    """List the methods of imagic-lora compare, or the settings of one of them.

        imagic-lora methods null-text

    Parameters
    ----------
    name
        Name of a method: its settings, with their defaults and meaning.
    """
    import_libraries()
    from ...methods.catalogue import SAMPLING
    from ...methods.comparison.candidates import FITS, GROUPS, NAMES, chosen

    if name is None:
        rows = [{"name": one, "needs": sorted(_needs(one)), "fast": one in GROUPS["fast"], "about": _about(one)} for one in NAMES]
        if as_json:
            print_json({"methods": rows})
            return
        cells = [
            [row["name"], " and ".join(row["needs"]).replace("_", " ") or "-", "yes" if row["fast"] else "-", row["about"]] for row in rows
        ]
        print_columns([["name", "needs", "fast", "what it is"], *cells])
        return
    chosen(name)
    if name not in NAMES:
        raise ImagicError(f"method {name}", f"one of {', '.join(NAMES)}", "correct the name")
    if name in FITS:
        if as_json:
            print_json({"name": name, "about": _about(name), "needs": sorted(_needs(name)), "settings": "docs/reference/settings.md"})
            return
        out.print(
            f"{_about(name)}\nIts settings are those of imagic-lora fit --help, by their YAML names: --set tune.steps=100", highlight=False
        )
        return
    fields = SAMPLING[name].config_class.model_fields
    defaults = SAMPLING[name].config_class().model_dump(mode="json")
    found = [{"name": field, "default": defaults[field], "about": fields[field].description} for field in fields]
    if as_json:
        print_json({"name": name, "about": _about(name), "needs": sorted(_needs(name)), "settings": found})
        return
    table = Table("--set", "default", "meaning", title=plain(_about(name)), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for setting in found:
        about = " ".join(str(setting["about"] or "").split())
        table.add_row(setting["name"], plain(json.dumps(setting["default"])), plain(about))
    out.print(table)


def _needs(name: str) -> frozenset[Need]:
    from ...methods.comparison.candidates import class_of

    return class_of(name).requires


def _about(name: str) -> str:
    """The first sentence of a method's description."""
    from ...methods.catalogue import IMAGIC, SUBJECT
    from ...methods.comparison.candidates import class_of

    if name in IMAGIC:
        return f"Imagic (arXiv 2210.09276) in mode {IMAGIC[name]}: a fit, then an edit at the default eta"
    if name in SUBJECT:
        paper = {"dreambooth": "DreamBooth (arXiv 2208.12242), as LoRA", "textual-inversion": "Textual inversion (arXiv 2208.01618)"}[name]
        return f"{paper}: a fit that learns the subject, then a new image of it from noise"
    text = " ".join((class_of(name).__doc__ or "").split("\n\n")[0].split())
    return text.rstrip(".")
