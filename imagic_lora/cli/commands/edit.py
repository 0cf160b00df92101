"""The command ``edit``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...adapters.writing import check_outputs, writable
from ...core.config import DeviceConfig, EditConfig, PresetOrAuto
from ...core.errors import ImagicError, ImagicWarning
from ...core.text import exact
from ..console import err, plain, print_json, progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, parse_etas, parse_seeds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL.Image import Image

    from ...adapters.adapter import Adapter
    from ...core.config import RunConfig
    from ...sampling.editor import Edit

SHEET = "sheet.png"
SamplingFlags = Annotated[
    EditConfig | None, Parameter(name="*", group="Sampling (default: the settings stored in the adapter)", show_default=False)
]


def edit(
    name: str,
    *,
    eta: str | None = None,
    seed: str = "0",
    prompt: str | None = None,
    settings: SamplingFlags = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group="Device and memory")] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    force: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Generate images from a stored adapter.

    One image is written for every eta and seed, and sheet.png shows them side by side. Look at the sheet first, then choose an eta.

        imagic-lora edit rex --eta 0.4:1:0.1 --seed 0:2

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    eta
        0: the reconstruction of the photo. 1: the target prompt alone. One (0.7), several (0.5,0.7), or a range with its end (0.3:1:0.1).
        Default: the adapter's.
    seed
        Seed of the starting noise. One (0), several (0,3), or a range without its end (0:4).
    prompt
        Target prompt. Default: the one that the adapter was fitted with.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    base
        Load the base from this name, folder, file or hub id instead. The weights must be the same; format and precision may differ.
    force
        Allow a base with other weights of the same shapes. The metadata of the images record it.
    out_dir
        Folder for the images. Default: outputs/NAME.
    overwrite
        Replace images of the same eta and seed in the folder that were made with another prompt, base or other settings.
    """
    from ...adapters.store import Store

    adapter = Store(store).read(name)
    record = adapter.record
    import_libraries(bitsandbytes=record.config.memory.quantize != "none")
    from ...bases.loading.registry import architecture_of
    from ...memory.presets import choose_preset_for_edit

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    source = (base, None) if base else (record.base.name, record.base.revision)
    run = choose_preset_for_edit(lambda: architecture_of(*source), record.config, {"edit": flags, "memory": levers, "preset": preset})
    etas, seeds = parse_etas(eta) if eta else [record.config.eta], parse_seeds(seed)
    folder = out_dir or Path("outputs") / adapter.name
    written = _edit(adapter, source, run, etas, seeds, prompt, force, folder, overwrite)
    if as_json:
        print_json({"adapter": adapter.name, "pictures": written, "sheet": str(folder / SHEET)})
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} image{plural} and {plain(folder / SHEET)}")


def _edit(
    adapter: Adapter,
    source: tuple[str, str | None],
    run: RunConfig,
    etas: list[float],
    seeds: list[int],
    prompt: str | None,
    force: bool,
    folder: Path,
    overwrite: bool,
) -> list[dict[str, Any]]:
    """Generates the images of all etas and seeds, and writes them into a folder.

    Args:
        adapter: the stored adapter.
        source: base and revision.
        run: settings of stage 3 and memory levers.
        etas: interpolation values, each in [0, 2].
        seeds: seeds of the starting noise.
        prompt: target prompt; None is that of the adapter.
        force: whether other weights of the same shapes are allowed.
        folder: output folder.
        overwrite: whether images that were made in another way are replaced.

    Returns:
        ``file``, ``eta`` and ``seed`` of every image.
    """
    from ...adapters.contents import read_canvas
    from ...bases.loading.registry import load_base
    from ...core.runtime import resolve_runtime
    from ...memory.levers import EDIT_LEVERS
    from ...memory.out_of_memory import explain_out_of_memory
    from ...sampling.checks import check_edit
    from ...sampling.editor import Editor

    config, record = run.edit, adapter.record
    target_prompt = record.prompt if prompt is None else prompt
    check_edit(etas, seeds, config, target_prompt)
    names = [_file_name(eta, seed) for eta in etas for seed in seeds]
    check_outputs(folder, [*names, SHEET])
    editor = Editor(load_base(source[0], resolve_runtime(run.memory), source[1]), force)
    edits = progress(editor.edit(adapter, etas, seeds, config, prompt), len(etas) * len(seeds), "images")
    other_weights = editor.base.fingerprint != record.base.fingerprint
    if other_weights and force:
        message = f"adapter {adapter.name} was made for base {record.base.name} and is applied to base {editor.base.name}"
        warnings.warn(message, ImagicWarning, stacklevel=1)
    metadata = {"adapter": adapter.name, "base": editor.base.name, "prompt": target_prompt, "edit": config.model_dump()}
    metadata |= {"forced": record.base.name} if other_weights else {}
    if not overwrite:
        _check_same_edits([folder / name for name in names], metadata)
    written = f"the images written so far are in {folder}"
    with explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", lambda: written, EDIT_LEVERS):
        return _write_edits(edits, folder, metadata, read_canvas(adapter).photo())


def _write_edits(edits: Iterable[Edit], folder: Path, metadata: dict[str, Any], photo: Image) -> list[dict[str, Any]]:
    """Writes every image as soon as it is generated, and the sheet at the end.

    Args:
        edits: the images.
        folder: output folder.
        metadata: written into every image, with its eta and seed.
        photo: first image of every row of the sheet. The sheet has one row for each seed.

    Returns:
        ``file``, ``eta`` and ``seed`` of every image.
    """
    from ...photos.png import write_png
    from ...photos.sheet import sheet

    written: list[dict[str, Any]] = []
    rows: dict[int, list[tuple[str, Image]]] = {}

    def save(image: Image, path: Path, values: dict[str, Any]) -> None:
        with writable(folder):
            write_png(image, path, values)

    for result in edits:
        path = folder / _file_name(result.eta, result.seed)
        save(result.image, path, metadata | {"eta": result.eta, "seed": result.seed})
        written.append({"file": str(path), "eta": result.eta, "seed": result.seed})
        rows.setdefault(result.seed, [("photo", photo)]).append((f"eta {exact(result.eta)} seed {result.seed}", result.image))
    named = {name: metadata[name] for name in ("adapter", "base", "forced") if name in metadata}
    save(sheet(list(rows.values()), metadata["prompt"]), folder / SHEET, named)
    return written


def _file_name(eta: float, seed: int) -> str:
    return f"eta{exact(eta)}-seed{seed}.png"


def _check_same_edits(paths: Iterable[Path], metadata: dict[str, Any]) -> None:
    """Raises ImagicError for a file that exists and is not the same edit, so that no image replaces another one unasked.

    Args:
        paths: files of the images.
        metadata: what the metadata of the images will be, without eta and seed.
    """
    from ...photos.reading import read_metadata
    from ...training.resuming.checkpoints import differences

    for path in paths:
        if not path.exists():
            continue
        try:
            changes = "; ".join(differences(_comparable(read_metadata(path)), _comparable(metadata)))
        except ImagicError:
            changes = "it was not written by imagic-lora edit"
        if changes:
            got = f"{path} is another image: {changes}"
            raise ImagicError(got, "an unused name, or the same edit", "choose another --out, or use --overwrite")


def _comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of an image without what its file name says, and without the batch size, which does not change it."""
    edit = metadata.get("edit")
    settings = {name: value for name, value in edit.items() if name != "batch_size"} if isinstance(edit, dict) else edit
    return metadata | {"edit": settings, "eta": None, "seed": None}
