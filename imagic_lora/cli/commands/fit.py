"""The command ``fit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ...core.config import RunConfig
from ...core.errors import ImagicError, Stopped
from ...core.launch import Launch, launched_settings, read_launch
from ...core.settings import merged, read_settings
from ..console import err, plain, print_active_settings, print_json, show_progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, slug, suggested_etas
from .store import summary

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...adapters.adapter import Adapter
    from ...adapters.store import Store
    from ...bases.architecture import Architecture
    from ...core.runtime import Processes
    from ...training.configure import Configured
    from ...training.stage import StepReport


LOG_DIR = Path("outputs/tensorboard")


def fit(
    image: Path,
    prompt: str,
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    config: Path | None = None,
    name: str | None = None,
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

        imagic-lora fit dog.jpg "a dog jumping" --base sd15 --name rex

    The defaults below are the built-in ones. A base and a preset may have other defaults; the run prints the active settings.

    Parameters
    ----------
    image
        The photo: JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF; HEIC needs the extra heic.
    prompt
        Target prompt: describes the edited image, for example "a dog jumping".
    config
        YAML file of settings. It overrides the preset, and flags override the file.
    name
        Name of the adapter. Default: the file name of the photo.
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

    if tracker_dir and not tracker:
        raise ImagicError(f"--tracker-dir {tracker_dir} without --tracker", "both, or neither", "add --tracker tensorboard")
    launch = read_launch()
    try:
        run, why, architecture = configured(settings, config, launch)
        name = name or slug(image.stem, "photo")
        processes, log_dir = _processes(run, launch), (tracker_dir or LOG_DIR) if tracker else None
        adapter = _fit(image, prompt, run, why, architecture, Store(store), name, overwrite, resume, processes, log_dir)
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
        err.print(f"[green]Stored[/] {folder} ({adapter.size / 1e6:.2f} MB). See {folder}/preview.png, then run:")
        err.print(f"  imagic-lora edit {adapter.name} --eta {suggested_etas(run.eta)}", highlight=False)


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
    import_libraries(bitsandbytes="quantize" in memory or "optimizer" in memory)
    from ...training.configure import configure_run

    return configure_run(flags, file, (launch.count, launch.local_rank))


def _fit(
    image: Path,
    prompt: str,
    run: RunConfig,
    why: str,
    architecture: Architecture,
    store: Store,
    name: str,
    overwrite: bool,
    resume: bool,
    processes: Processes,
    log_dir: Path | None,
) -> Adapter | None:
    """Runs the fit with its progress, and logs it in a folder if there is one. A signal stops it after the current step."""
    from ...core.runtime import resolve_runtime
    from ...memory.limits import adapter_bytes
    from ...training.fit import fit as fit_steps
    from ...training.fit import result
    from ...training.monitoring.trackers import check_tensorboard, tracked
    from ..interrupts import Interrupts

    if log_dir:
        check_tensorboard(log_dir)
    with Interrupts() as interrupts:
        steps = fit_steps(image, prompt, run, store, name, overwrite=overwrite, resume=resume, stop=interrupts.stop, processes=processes)

        def print_settings_first() -> Generator[StepReport, None, Adapter | None]:
            try:
                first = next(steps)  # every check of the inputs has passed once this returns
            except StopIteration as done:  # resumed after the last step
                return done.value
            interrupts.finish_step = True
            if processes.main:
                print_active_settings(resolve_runtime(run.memory), run, why, processes.count, adapter_bytes(architecture, run))
            yield first
            return (yield from steps)

        try:
            reports = print_settings_first()
            if log_dir and processes.main:
                reports = tracked(reports, run, name, log_dir)
            return show_progress(reports, run) if processes.main else result(reports)
        except KeyboardInterrupt:
            if name in store.unfinished():
                raise Stopped("the previous checkpoint is unchanged") from None
            raise


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
