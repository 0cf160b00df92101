"""The command ``edit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from ...core.config import EditConfig, PresetOrAuto
from ...core.device_config import DEVICE_GROUP, DeviceConfig
from ...core.errors import ImagicError
from ..console import err, plain, print_json
from ..libraries import import_libraries, quantized
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, check_interpolates, explicit, parse_etas, parse_seeds, prompt_folders

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
    keep: str | None = None,
    save_mask: Flag = False,
    photo: Path | None = None,
    settings: SamplingFlags = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group=DEVICE_GROUP)] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    twin: Flag = False,
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
        auto: search for one with seven images of the first seed. Default: the adapter's. Adapters of --method dreambooth and
        textual-inversion have no eta.
    seed
        Seed of the starting noise. One (0), several (0,3), or a range without its end (0:4).
    prompt
        Target prompt. Default: the one that the adapter was fitted with.
    prompt_file
        Text file with one target prompt a line. The images of each are in a folder of their own: outputs/NAME/1-a-dog-jumping.
    keep
        What must not change is taken from the photo at its full size, byte for byte; the seam is feathered. auto: all that the edit did not
        change against the image at eta 0, one more image for each seed. MASK.png: your own mask in the size of the photo; white may change,
        black stays, gray blends.
    save_mask
        Write the mask of each image too, as eta...mask.png, and show it in the sheet. White is from the edit, black from the photo.
    photo
        The photo's file, for an adapter that does not hold it: for --keep, a --region, and starts from the photo.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    base
        Load the base from this name, folder, file or hub id instead. The weights must be the same; format and precision may differ.
    twin
        Sample with the distilled twin of the adapter's base, in its few steps and without guidance: klein-4b for klein-base-4b. The
        metadata of the images record it.
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
    if save_mask and keep is None and adapter.record.source.region is None:
        got = f"--save-mask without --keep, and adapter {adapter.name} is that of a whole photo"
        raise ImagicError(got, "--save-mask with --keep", "add --keep auto, or leave out --save-mask")
    check_interpolates(adapter, {"--eta": eta, "--keep": keep, "--photo": None if adapter.withheld else photo}, settings)
    import_libraries(bitsandbytes=quantized(adapter.record.config.memory))
    from ...adapters.contents import with_photo
    from ...sampling.keep import read_keep
    from ...sampling.opening import edit_settings, twin_of
    from ..editing import Edits

    adapter = with_photo(adapter, photo)
    if twin and base is not None:
        raise ImagicError("--twin together with --base", "one of them", "leave out one")
    base = twin_of(adapter) if twin else base
    run = edit_settings(adapter, explicit(settings, device, preset), base, twin)
    etas, seeds = ([] if eta == AUTO else parse_etas(eta)) if eta is not None else [adapter.record.eta], parse_seeds(seed)
    folder = out_dir or Path("outputs") / adapter.name
    if prompt_file and prompt is not None:
        raise ImagicError("--prompt together with --prompt-file", "one of them", "leave out one")
    prompts = prompt_folders(prompt_file, folder) if prompt_file else {folder: prompt}
    edits = Edits(adapter, run, seeds, prompts, read_keep(adapter, keep, photo), save_mask, metadata, overwrite, twin)
    written, searches = edits.write(etas, base, force)
    if as_json:
        sheets: dict[str, Any] = {"sheets": edits.sheets} if prompt_file else {"sheet": edits.sheets[0]}
        print_json(
            {"adapter": adapter.name, "pictures": written}
            | sheets
            | ({"auto": searches if prompt_file else searches[0]} if searches else {})
        )
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} image{plural} and {plain(' '.join(edits.sheets))}")
