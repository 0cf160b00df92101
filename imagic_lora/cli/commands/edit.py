"""The command ``edit``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from ...adapters.writing import check_outputs
from ...core.config import DEVICE_GROUP, DeviceConfig, EditConfig, PresetOrAuto
from ...core.errors import ImagicError
from ..console import err, plain, print_json, progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, parse_etas, parse_seeds, prompt_folders
from ..searching import searched_eta

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...core.config import RunConfig

_SAMPLING = Group("Sampling (default: the settings stored in the adapter)", sort_key=3)
AUTO = "auto"
"""The value of ``--eta`` that searches for one."""
SamplingFlags = Annotated[
    EditConfig | None,
    Parameter(name="*", group=_SAMPLING, show_default=False),
]


def edit(
    name: str,
    *,
    eta: str | None = None,
    seed: str = "0",
    prompt: str | None = None,
    prompt_file: Path | None = None,
    settings: SamplingFlags = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group=DEVICE_GROUP)] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    force: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    overwrite: Flag = False,
    metadata: Annotated[bool, Parameter(negative="--no-metadata")] = True,
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
    prompt_file
        Text file with one target prompt a line. The images of each are in a folder of their own: outputs/NAME/1-a-dog-jumping.
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
    metadata
        Write into every image how it was made, for imagic-lora reproduce and as the text that A1111 reads. --no-metadata: neither.
    """
    from ...adapters.store import Store

    adapter = Store(store).read(name)
    record = adapter.record
    import_libraries(bitsandbytes=record.config.memory.quantize != "none")
    from ...sampling.opening import edit_settings
    from ...sampling.outputs import SHEET

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    run = edit_settings(adapter, {"edit": flags, "memory": levers, "preset": preset}, base)
    etas, seeds = ([] if eta == AUTO else parse_etas(eta)) if eta else [record.eta], parse_seeds(seed)
    folder = out_dir or Path("outputs") / adapter.name
    if prompt_file and (prompt is not None or eta == AUTO):
        raise ImagicError(f"{'--eta auto' if prompt is None else '--prompt'} together with --prompt-file", "one of them", "leave out one")
    prompts = prompt_folders(prompt_file, folder) if prompt_file else {folder: prompt}
    written, search = _edit(adapter, base, run, etas, seeds, prompts, force, overwrite, metadata)
    sheets = [str(each / SHEET) for each in prompts]
    if as_json:
        found: dict[str, Any] = {"sheets": sheets} if prompt_file else {"sheet": sheets[0]}
        print_json({"adapter": adapter.name, "pictures": written} | found | ({"auto": search} if search else {}))
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} image{plural} and {plain(' '.join(sheets))}")


def _edit(
    adapter: Adapter,
    base: str | None,
    run: RunConfig,
    etas: list[float],
    seeds: list[int],
    prompts: dict[Path, str | None],
    force: bool,
    overwrite: bool,
    metadata: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Generates the images of all prompts, etas and seeds, and writes those of each prompt into its folder.

    Args:
        adapter: the stored adapter.
        base: a base that replaces the one in the adapter's record.
        run: settings of stage 3 and memory levers.
        etas: interpolation values, each in [0, 2]; none to search for one.
        seeds: seeds of the starting noise.
        prompts: target prompt by output folder; None is that of the adapter.
        force: whether other weights of the same shapes are allowed.
        overwrite: whether images that were made in another way are replaced.
        metadata: whether the images say how they were made.

    Returns:
        ``file``, ``eta``, ``seed`` and, for several prompts, ``prompt`` of every image; and what
        :func:`~imagic_lora.cli.searching.searched_eta` returns, empty without a search.
    """
    from ...adapters.contents import read_canvas
    from ...memory.levers import EDIT_LEVERS
    from ...memory.out_of_memory import explain_out_of_memory
    from ...sampling.checks import check_edit
    from ...sampling.metadata import image_metadata
    from ...sampling.opening import open_editor
    from ...sampling.outputs import SHEET, check_same_edits, image_name, write_edits

    config, targets = run.edit, {folder: adapter.record.prompt if one is None else one for folder, one in prompts.items()}
    names = [image_name(eta, seed) for eta in etas for seed in seeds]
    for folder, target_prompt in targets.items():
        check_edit(etas, seeds, config, target_prompt)
        check_outputs(folder, [*names, SHEET])
    editor = open_editor(adapter, run, base, force)
    made = {folder: image_metadata(adapter, editor.base, config, target_prompt) for folder, target_prompt in targets.items()}
    others = [None if target_prompt == adapter.record.prompt else target_prompt for target_prompt in targets.values()]
    first, search, pictures = next(iter(prompts)), dict[str, Any](), list[dict[str, Any]]()
    written = f"the images written so far are in {first if len(prompts) == 1 else first.parent}"
    with explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", lambda: written, EDIT_LEVERS):
        if not etas:
            search = searched_eta(editor, adapter, seeds[0], config, others[0])
            etas, names = [search["eta"]], [image_name(search["eta"], seed) for seed in seeds]
            check_outputs(first, names)
        if not overwrite:
            for folder, common in made.items():
                check_same_edits([folder / name for name in names], common)
        edits = (edit for prompt in others for edit in editor.edit(adapter, etas, seeds, config, prompt))
        shown, photo = iter(progress(edits, len(names) * len(prompts), "images")), read_canvas(adapter).photo()
        for folder, common in made.items():
            found = write_edits(islice(shown, len(names)), folder, common, photo, metadata)
            pictures += [one | ({"prompt": targets[folder]} if len(prompts) > 1 else {}) for one in found]
    return pictures, search
