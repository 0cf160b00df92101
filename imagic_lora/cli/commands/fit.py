"""The command ``fit``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ...core.config import RunConfig
from ...core.errors import ImagicError, Stopped
from ...core.launch import Launch, launched_settings, read_launch
from ...core.settings.merging import merged
from ...core.settings.reading import read_settings
from ...core.text import slug
from ...photos.region import parse_region
from ..console import err, plain, print_active_settings, print_json, show_progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, suggested_flags
from .store import summary

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ...adapters.adapter import Adapter
    from ...adapters.store import Store
    from ...core.runtime import Processes
    from ...training.configure import Configured
    from ...training.stage import StepReport
    from ..interrupts import Interrupts


LOG_DIR = Path("outputs/tensorboard")


def fit(
    image: Path,
    prompt: str,
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    config: Path | None = None,
    name: str | None = None,
    region: str | None = None,
    store_photo: bool = True,
    store: StoreDir = DEFAULT_STORE,
    resume: Flag = False,
    overwrite: Flag = False,
    tracker: Literal["tensorboard"] | None = None,
    tracker_dir: Path | None = None,
    as_json: Json = False,
) -> None:
    """Train an adapter on a photo and store it.

    Stage 1 optimises the embedding of the target prompt on the photo. Stage 2 trains the denoiser on the photo; --mode embedding leaves it
    out. Afterwards imagic-lora edit generates images from the adapter.

    With --method dreambooth or textual-inversion the photo may be a folder of photos of one subject, and the prompt describes them:

        imagic-lora fit dogs/ "a photo of sks dog" --method dreambooth --class-prompt "a photo of a dog"
        imagic-lora fit dogs/ "a photo of <my-dog>" --method textual-inversion --initial-word dog

        imagic-lora fit dog.jpg "a dog jumping" --base sd15 --name rex

    The defaults below are the built-in ones. A base and a preset may have other defaults; the run prints the active settings.

    Parameters
    ----------
    image
        The photo: JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF; HEIC needs the extra heic. For the other methods also a folder of photos.
    prompt
        Target prompt: describes the edited image, for example "a dog jumping". For the other methods it describes the photos.
    config
        YAML file of settings. It overrides the preset, and flags override the file.
    name
        Name of the adapter. Default: the file name of the photo.
    region
        X,Y,W,H: fit this part of the photo only, in pixels of the upright photo. Edits are pasted into the whole photo, which stays sharp.
        Default: the whole photo.
    store_photo
        Keep a copy of the photo's file in the adapter, with all its metadata, for edits with --keep or of a --region. Without it they need
        --photo.
    resume
        Resume an interrupted fit (Ctrl-C, a crash, a power cut). Photo, prompt, base and settings must be those of the interrupted command.
    overwrite
        Replace an existing adapter of the same name, and discard the checkpoints of an interrupted fit.
    tracker
        Also log losses, relative losses and previews. tensorboard: to TensorBoard, which the extra tensorboard installs.
    tracker_dir
        Folder of the files of --tracker. Default: outputs/tensorboard. See them with: tensorboard --logdir FOLDER
    """
    from ...adapters.store import Store

    part = parse_region(region) if region is not None else None
    if tracker_dir and not tracker:
        raise ImagicError(f"--tracker-dir {tracker_dir} without --tracker", "both, or neither", "add --tracker tensorboard")
    launch = read_launch()
    try:
        chosen = configured(settings, config, launch)
        from ...training.fit import fit as fit_steps

        name = name or slug(image.resolve().stem, "photo")
        processes, log_dir = _processes(chosen.run, launch), (tracker_dir or LOG_DIR) if tracker else None
        start = partial(fit_steps, image, prompt, chosen.run, Store(store), name, overwrite=overwrite, resume=resume)
        start = partial(start, region=part, store_photo=store_photo, processes=processes)
        adapter = _run(start, chosen, Store(store), name, processes, log_dir)
    except (KeyboardInterrupt, Stopped):
        if launch.rank:
            sys.exit(130)  # the main process reports it
        raise
    if adapter is None:
        return
    if as_json:
        print_json({"name": adapter.name, "folder": str(adapter.folder), "bytes": adapter.size, **summary(adapter)})
    else:
        folder = plain(adapter.folder)
        photo = f", and the photo's file of {adapter.photo_size / 1e6:.2f} MB" if adapter.photo_size else ""
        err.print(f"[green]Stored[/] {folder} ({adapter.size / 1e6:.2f} MB{photo}). See {folder}/preview.png, then run:")
        err.print(f"  imagic-lora edit {adapter.name} {suggested_flags(adapter)}", highlight=False)


def configured(settings: RunConfig | None, config: Path | None, launch: Launch) -> Configured:
    """Returns the settings of a run.

    They come from the flags, the configuration file and the environment variables that ``accelerate launch`` sets.

    Args:
        settings: the flags that were given.
        config: path of the configuration file.
        launch: the processes that a launcher started.
    """
    flags = merged({"memory": launched_settings()}, settings.model_dump(exclude_unset=True) if settings else {})
    file = read_settings(config) if config else {}
    memory = merged(file, flags)["memory"]  # both are valid
    import_libraries(bitsandbytes="quantize" in memory or "quantize_text" in memory or "optimizer" in memory)
    from ...training.configure import configure_run

    return configure_run(flags, file, (launch.count, launch.local_rank))


def _run(
    start: Callable[..., Generator[StepReport, None, Adapter | None]],
    settings: Configured,
    store: Store,
    name: str,
    processes: Processes,
    log_dir: Path | None,
) -> Adapter | None:
    """Runs a fit with its progress, and logs it in a folder if there is one.

    A signal ends the fit at once before its first step, and stops it after the current step later.

    Args:
        start: starts the fit, given ``stop``.
        settings: its settings, with the reason for the preset.
        store, name: where it is stored.
        processes: the processes of the run; only the main one prints.
        log_dir: folder of the logs.
    """
    from ...training.fit import result
    from ...training.monitoring.trackers import check_tensorboard, tracked
    from ..interrupts import Interrupts

    if log_dir:
        check_tensorboard(log_dir)
    try:
        with Interrupts() as interrupts:
            reports = _settings_first(start(stop=interrupts.stop), settings, processes, interrupts)
            if log_dir and processes.main:
                reports = tracked(reports, settings.run, name, log_dir)
            return show_progress(reports, settings.run) if processes.main else result(reports)
    except KeyboardInterrupt:
        if name in store.unfinished():
            raise Stopped("the previous checkpoint is unchanged") from None
        raise


def _settings_first(
    steps: Generator[StepReport, None, Adapter | None], settings: Configured, processes: Processes, interrupts: Interrupts
) -> Generator[StepReport, None, Adapter | None]:
    """Yields the reports of a fit. The active settings are printed before the first one, when every check of the inputs has passed."""
    from ...core.runtime import resolve_runtime
    from ...memory.limits import adapter_bytes

    try:
        first = next(steps)
    except StopIteration as done:  # resumed after the last step
        return done.value
    interrupts.finish_step = True
    if processes.main:
        run, why, architecture = settings
        print_active_settings(resolve_runtime(run.memory), run, why, processes.count, adapter_bytes(architecture, run))
    yield first
    return (yield from steps)


def _processes(run: RunConfig, launch: Launch) -> Processes:
    """Connects this process with the others that a launcher started."""
    from ...core.runtime import Processes, resolve_runtime

    if launch.count == 1:
        return Processes()
    from accelerate import PartialState

    cpu = resolve_runtime(run.memory).device.type == "cpu"
    if launch.rank == 0:
        err.print(f"Waiting for {launch.count} processes to connect", highlight=False)
    try:
        processes = Processes(PartialState(cpu=cpu))
    except (RuntimeError, ValueError, OSError, ImportError) as error:  # from torch.distributed and its backends
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "start them with accelerate launch, and check MASTER_ADDR and MASTER_PORT"
        raise ImagicError(f"the {launch.count} processes cannot connect ({reason})", "processes of one launcher", remedy) from error
    if processes.count != launch.count:
        got = f"{launch.count} processes were launched, but {processes.count} can communicate"
        raise ImagicError(got, "one device for each process", "use a lower --num_processes of accelerate launch")
    return processes
