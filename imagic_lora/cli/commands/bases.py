"""The command that lists bases."""

from __future__ import annotations

from rich.table import Table

from ..console import err, out, plain, print_json
from ..options import Json


def bases(*, as_json: Json = False) -> None:
    """The bases that have a name; your own are added in a YAML file, see docs/bases.md."""
    from ...bases.loading.known import SHIPPED, bases_file, named_bases

    known = named_bases()
    if as_json:
        print_json({"file": str(bases_file()), "bases": {name: one.model_dump(mode="json") for name, one in known.items()}})
        return
    table = Table("name", "pixels", "predicts", "steps", "source")
    for name, one in known.items():
        pixels, steps = (str(value) if value else "" for value in (one.resolution, one.few_steps))
        source = "in this package" if name == "critters" else f"{one.source}{f' at {one.revision}' if one.revision else ''}"
        table.add_row(*map(plain, (name if name in SHIPPED else f"{name} (yours)", pixels, one.prediction or "", steps, source)))
    out.print(table)
    err.print(f"Your own: {plain(bases_file())}", highlight=False)
