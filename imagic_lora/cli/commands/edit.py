"""The command that makes pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...adapters.atomic import writable
from ...core.config import DeviceConfig, EditConfig, PresetOrAuto
from ...core.errors import ImagicWarning
from ..console import err, plain, print_json, progress
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, parse_etas, parse_seeds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL.Image import Image

    from ...adapters.adapter import Adapter
    from ...core.config import RunConfig
    from ...sampling.editor import Edit


def edit(
    name: str,
    *,
    eta: str | None = None,
    seed: str = "0",
    prompt: str | None = None,
    settings: Annotated[
        EditConfig | None, Parameter(name="*", group="Sampling (the adapter's own settings where not given)", show_default=False)
    ] = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group="Device and memory")] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    force: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """Make pictures from a stored adapter.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    eta
        How far from the photo (0) to the text (1): one value, several (0.5,0.7), or a range with its end (0.3:1:0.1). The adapter's own
        default where not given.
    seed
        Seed of the starting noise: one, several (0,3), or a range without its end (0:4).
    prompt
        Another target text than the one the adapter was fitted for.
    preset
        Memory levers for a size of card; auto takes the fastest that fits 90% of the free memory.
    base
        Load the base from here instead of where the adapter says; it must be the same weights, as a folder, a single file or in fp16.
    force
        Use the adapter on other weights of the same shapes as well; the pictures' metadata say so.
    out_dir
        Folder for the pictures; outputs/NAME where not given.
    """
    from ...adapters.store import Store
    from ...bases.loading.progress import hide_progress_bars
    from ...bases.loading.registry import architecture_of
    from ...memory.presets import choose_preset_for_edit

    hide_progress_bars()
    adapter = Store(store).read(name)
    record = adapter.record
    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    source = (base, None) if base else (record.base.name, record.base.revision)
    run = choose_preset_for_edit(lambda: architecture_of(*source), record.config, {"edit": flags, "memory": levers, "preset": preset})
    etas, seeds = parse_etas(eta) if eta else [record.config.eta], parse_seeds(seed)
    folder = out_dir or Path("outputs") / adapter.name
    written = _edit(adapter, source, run, etas, seeds, prompt, force, folder)
    if as_json:
        print_json({"adapter": adapter.name, "pictures": written, "sheet": str(folder / "sheet.png")})
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} picture{plural} and {plain(folder / 'sheet.png')}")


def _edit(
    adapter: Adapter,
    source: tuple[str, str | None],
    run: RunConfig,
    etas: list[float],
    seeds: list[int],
    prompt: str | None,
    force: bool,
    folder: Path,
) -> list[dict[str, Any]]:
    """Opens the base (name and revision) and writes the images of all etas and seeds into a folder; gives their files."""
    from ...adapters.contents import read_canvas
    from ...bases.loading.registry import load_base
    from ...core.runtime import resolve_runtime
    from ...memory.levers import EDIT_LEVERS
    from ...memory.out_of_memory import explain_out_of_memory
    from ...sampling.checks import check_edit
    from ...sampling.editor import Editor

    config, record = run.edit, adapter.record
    text = record.prompt if prompt is None else prompt
    check_edit(etas, seeds, config, text)
    with writable(folder):
        pass
    editor = Editor(load_base(source[0], resolve_runtime(run.memory), source[1]), force)
    edits = progress(editor.edit(adapter, etas, seeds, config, prompt), len(etas) * len(seeds), "pictures")
    foreign = editor.base.fingerprint != record.base.fingerprint
    if foreign and force:
        warnings.warn(
            f"{adapter.name} was made for base {record.base.name}, and is used on {editor.base.name}", ImagicWarning, stacklevel=1
        )
    how = {"adapter": adapter.name, "base": editor.base.name, "prompt": text, "edit": config.model_dump()}
    how |= {"forced": record.base.name} if foreign else {}
    so_far = f"the pictures made so far are in {folder}"
    with explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", lambda: so_far, EDIT_LEVERS):
        return _write_edits(edits, folder, how, read_canvas(adapter).photo())


def _write_edits(edits: Iterable[Edit], folder: Path, how: dict[str, Any], photo: Image) -> list[dict[str, Any]]:
    """Writes every picture as it comes and the sheet at the end, a row for each seed; gives the files of the pictures."""
    from ...photos.png import write_png
    from ...photos.sheet import sheet

    written: list[dict[str, Any]] = []
    rows: dict[int, list[tuple[str, Image]]] = {}
    for one in edits:
        path = folder / f"eta{one.eta:g}-seed{one.seed}.png"
        write_png(one.image, path, how | {"eta": one.eta, "seed": one.seed})
        written.append({"file": str(path), "eta": one.eta, "seed": one.seed})
        rows.setdefault(one.seed, [("photo", photo)]).append((f"eta {one.eta:g} seed {one.seed}", one.image))
    write_png(
        sheet(list(rows.values()), how["prompt"]),
        folder / "sheet.png",
        {name: how[name] for name in ("adapter", "base", "forced") if name in how},
    )
    return written
