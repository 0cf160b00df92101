"""The command ``edit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...adapters.writing import check_outputs
from ...core.config import DeviceConfig, EditConfig, PresetOrAuto
from ...core.errors import ImagicError
from ..console import err, plain, print_json, progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, parse_etas, parse_seeds
from ..searching import searched_eta

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...core.config import RunConfig
    from ...sampling.keep import Keep

AUTO = "auto"
"""The value of ``--eta`` that searches for one."""
SamplingFlags = Annotated[
    EditConfig | None, Parameter(name="*", group="Sampling (default: the settings stored in the adapter)", show_default=False)
]


def edit(
    name: str,
    *,
    eta: str | None = None,
    seed: str = "0",
    prompt: str | None = None,
    keep: str | None = None,
    save_mask: Flag = False,
    photo: Path | None = None,
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
        auto: search for one with seven images of the first seed. Default: the adapter's.
    seed
        Seed of the starting noise. One (0), several (0,3), or a range without its end (0:4).
    prompt
        Target prompt. Default: the one that the adapter was fitted with.
    keep
        What must not change is taken from the photo at its full size, byte for byte; the seam is feathered. auto: all that the edit did not
        change against the image at eta 0, one more image for each seed. MASK.png: your own mask in the size of the photo; white may change,
        black stays, gray blends.
    save_mask
        Write the mask of each image too, as eta...mask.png, and show it in the sheet. White is from the edit, black from the photo.
    photo
        The photo's file, for --keep or a --region with an adapter that does not hold it.
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
    if save_mask and keep is None and record.source.region is None:
        got = f"--save-mask without --keep, and adapter {adapter.name} is that of a whole photo"
        raise ImagicError(got, "--save-mask with --keep", "add --keep auto, or leave out --save-mask")
    import_libraries(bitsandbytes=record.config.memory.quantize != "none")
    from ...sampling.keep import read_keep
    from ...sampling.opening import edit_settings
    from ...sampling.outputs import SHEET

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    run = edit_settings(adapter, {"edit": flags, "memory": levers, "preset": preset}, base)
    etas, seeds = ([] if eta == AUTO else parse_etas(eta)) if eta else [record.eta], parse_seeds(seed)
    folder = out_dir or Path("outputs") / adapter.name
    kept = read_keep(adapter, keep, photo)
    written, search = _edit(adapter, base, run, etas, seeds, prompt, kept, save_mask, force, folder, overwrite)
    if as_json:
        print_json({"adapter": adapter.name, "pictures": written, "sheet": str(folder / SHEET)} | ({"auto": search} if search else {}))
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} image{plural} and {plain(folder / SHEET)}")


def _edit(
    adapter: Adapter,
    base: str | None,
    run: RunConfig,
    etas: list[float],
    seeds: list[int],
    prompt: str | None,
    keep: Keep | None,
    save_mask: bool,
    force: bool,
    folder: Path,
    overwrite: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Generates the images of all etas and seeds, and writes them into a folder.

    Args:
        adapter: the stored adapter.
        base: a base that replaces the one in the adapter's record.
        run: settings of stage 3 and memory levers.
        etas: interpolation values, each in [0, 2]; none to search for one.
        seeds: seeds of the starting noise.
        prompt: target prompt; None is that of the adapter.
        keep: how the edits are pasted into the photo; None for edits of the whole photo.
        save_mask: whether the masks are written too.
        force: whether other weights of the same shapes are allowed.
        folder: output folder.
        overwrite: whether images that were made in another way are replaced.

    Returns:
        ``file``, ``eta`` and ``seed`` of every image; and what :func:`~imagic_lora.cli.searching.searched_eta` returns, empty without a
        search.
    """
    from ...adapters.contents import read_canvas
    from ...memory.levers import EDIT_LEVERS
    from ...memory.out_of_memory import explain_out_of_memory
    from ...sampling.checks import check_edit
    from ...sampling.opening import open_editor
    from ...sampling.outputs import SHEET, check_same_edits, image_metadata, image_name, mask_name, write_edits

    config, target_prompt = run.edit, adapter.record.prompt if prompt is None else prompt
    check_edit(etas, seeds, config, target_prompt)

    def outputs() -> list[str]:
        masks = [mask_name(eta, seed) for eta in etas for seed in seeds] if save_mask else []
        return [*(image_name(eta, seed) for eta in etas for seed in seeds), *masks]

    check_outputs(folder, [*outputs(), SHEET])
    editor = open_editor(adapter, run, base, force)
    metadata = image_metadata(adapter, editor.base, config, target_prompt) | (keep.metadata if keep else {})
    written = f"the images written so far are in {folder}"
    with explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", lambda: written, EDIT_LEVERS):
        search = {} if etas else searched_eta(editor, adapter, seeds[0], config, prompt)
        etas = etas or [search["eta"]]
        check_outputs(folder, outputs())
        if not overwrite:
            check_same_edits([folder / name for name in outputs()], metadata)
        generated = keep.etas(etas) if keep else etas
        edits = progress(editor.edit(adapter, generated, seeds, config, prompt), len(generated) * len(seeds), "images")
        pasted, region = (keep.pasted(edits, etas), keep.composite.region) if keep else (edits, None)
        return write_edits(pasted, folder, metadata, read_canvas(adapter).photo(), region, save_mask), search
