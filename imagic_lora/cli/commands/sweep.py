"""The command ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ...core.config import PresetOrAuto
from ...core.device_config import DeviceConfig
from ...core.errors import ImagicError
from ..console import print_json
from ..libraries import import_libraries, quantized
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, Whole, check_interpolates, explicit, parse_etas
from .edit import SamplingFlags


def sweep(
    name: str,
    *,
    eta: str = "0:1.2:0.1",
    seeds: Whole | None = None,
    prompt: str | None = None,
    before_tuning: Flag = False,
    store_eta: Flag = False,
    clip: str | None = None,
    dino: str | None = None,
    source_prompt: str | None = None,
    offline: Flag = False,
    photo: Path | None = None,
    settings: SamplingFlags = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group="Device and memory")] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    force: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """Show what eta does to a stored adapter, and suggest one.

    Generates an image for every eta and seed, and scores each one: how well it agrees with the target prompt (alignment), and how near it
    is to the reconstruction of the photo (fidelity). The scores come from the base itself. Writes sheet.png (the images), plot.png (both
    scores over eta, the range where both are good, the suggestion), scores.csv, scores.json, and into images/ each image at full size.

        imagic-lora sweep rex
        imagic-lora edit rex --eta 0.7 --keep auto  # the eta that the sheet shows as the best

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    eta
        Etas: several (0,0.5,0.7), or a range with its end (0:1.2:0.1). 0 is always added: the scores compare with it.
    seeds
        Number of seeds, from 0 on. Default: 4, or 1 where the seed has no effect.
    prompt
        Target prompt. Default: the one that the adapter was fitted with.
    before_tuning
        Add a row from the base without the weights of the adapter, with its embeddings alone, for seed 0.
    store_eta
        Store the suggested eta in the adapter: the default of imagic-lora edit.
    clip
        Also score by this CLIP model, a folder or a hub id, such as openai/clip-vit-large-patch14: similarity to the target prompt.
    dino
        Also score by this DINOv2 model, a folder or a hub id, such as facebook/dinov2-base: similarity to the photo.
    source_prompt
        Caption of the photo, for the directional similarity of CLIP.
    offline
        Take the models of --clip and --dino from the cache of the hub only.
    photo
        The photo's file, for an adapter that does not hold it: images of a --region are pasted into the whole photo, and those of an
        adapter that was sent without its photo are compared with it.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory. Without
        --batch-size, as many images are generated at once as fit.
    base
        Load the base from this name, folder, file or hub id instead. The weights must be the same; format and precision may differ.
    force
        Allow a base with other weights of the same shapes.
    out_dir
        Folder for the files. Default: outputs/NAME/sweep. The files of an earlier sweep in it are deleted.
    """
    from ...adapters.store import Store

    adapter = Store(store).read(name)
    check_interpolates(adapter, {"--eta": eta})
    etas = sorted({0.0, *parse_etas(eta)})
    if len(etas) < 3:
        raise ImagicError(f"--eta {eta}", "at least two etas besides 0", "use for example --eta 0:1.2:0.1")
    import_libraries(bitsandbytes=quantized(adapter.record.config.memory))
    from ...adapters.contents import with_photo
    from ...adapters.withheld import require_photo
    from ...sampling.keep import read_keep
    from ...sampling.opening import edit_settings
    from ..sweeping import check_storable, load_metrics, report, run_sweep, seed_count, with_largest_batch, with_metrics, write

    adapter = with_photo(adapter, photo)
    require_photo(adapter, "a sweep compares images with the photo")
    given = explicit(settings, device, preset)
    run = edit_settings(adapter, given, base)
    count = seed_count(run, seeds)
    if store_eta:
        check_storable(adapter, run, prompt, force)
    metrics = load_metrics(adapter, prompt or adapter.record.prompt, clip, dino, source_prompt, offline)
    folder = out_dir or Path("outputs") / adapter.name / "sweep"
    if "batch_size" not in given["edit"]:
        run = with_largest_batch(adapter, run, base, len(etas) * count)
    keep = read_keep(adapter, None, photo)
    pictures, scores = run_sweep(adapter, base, run, etas, list(range(count)), prompt, before_tuning, force, keep, folder)
    scores = with_metrics(adapter, pictures, scores, metrics)
    summary = write(adapter, run, prompt or adapter.record.prompt, pictures, scores, folder)
    if store_eta:
        from ...adapters.record import EtaRecord

        Store(store).suggest_eta(adapter, EtaRecord(eta=summary["suggested"], rule=summary["rule"], seeds=count))
    if as_json:
        print_json(summary | {"stored": store_eta})
        return
    report(summary, store_eta)
