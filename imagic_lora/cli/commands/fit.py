"""The command that learns a photo."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...core.config import RunConfig
from ...core.errors import ImagicError, Stopped
from ...core.settings import merged, read_yaml
from ..console import err, plain, print_active_settings, print_json, show_progress
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, suggested_etas
from .store import summary

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...adapters.adapter import Adapter
    from ...adapters.store import Store
    from ...bases.architecture import Architecture
    from ...training.configure import Configured
    from ...training.stage import StepReport


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
    as_json: Json = False,
) -> None:
    """Learn a photo: optimise the text embedding on it, tune the denoiser on it, store the adapter.

    The defaults shown are the built-in ones; a base and a preset may have others, and the run prints what is active.

    Parameters
    ----------
    image
        The photo: JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF; HEIC with the extra heic.
    prompt
        What the edited photo shows, as one sentence: "a dog jumping".
    config
        YAML file of settings, laid over the preset; flags are laid over both.
    name
        Name of the adapter; made from the photo's file name where not given.
    resume
        Go on from where the same command was interrupted (Ctrl-C, a kill, a power cut): the same photo, sentence, base and settings.
    overwrite
        Replace an adapter of the same name, and begin an interrupted fit anew.
    """
    from ...adapters.store import Store
    from ...bases.loading.progress import hide_progress_bars

    hide_progress_bars()
    run, why, built = configured(settings, config)
    adapter = _fit(image, prompt, run, why, built, Store(store), name or _slug(image.stem), overwrite, resume)
    if adapter is None:
        return
    if as_json:
        print_json({"name": adapter.name, "folder": str(adapter.folder), "bytes": adapter.size, **summary(adapter)})
    else:
        folder = plain(adapter.folder)
        err.print(f"[green]Stored[/] {folder} ({adapter.size / 1e6:.2f} MB). Look at {folder}/preview.png, then:")
        err.print(f"  imagic-lora edit {adapter.name} --eta {suggested_etas(run.eta)}", highlight=False)


def configured(settings: RunConfig | None, config: Path | None) -> Configured:
    """The settings of a run from flags, file and the environment that ``accelerate launch`` sets."""
    from ...training.configure import configure_run

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        flags = merged({"memory": {"device": "cpu"}}, flags)
    started = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    return configure_run(flags, read_yaml(config) if config else {}, started)


def _fit(
    image: Path, prompt: str, run: RunConfig, why: str, built: Architecture, store: Store, name: str, overwrite: bool, resume: bool
) -> Adapter | None:
    from ...core.runtime import resolve_runtime
    from ...memory.limits import adapter_bytes
    from ...training.fit import fit as fit_steps
    from ...training.fit import result
    from ..interrupts import Interrupts

    processes = _processes(run)
    with Interrupts() as interrupts:
        steps = fit_steps(image, prompt, run, store, name, overwrite=overwrite, resume=resume, stop=interrupts.stop, processes=processes)

        def announced() -> Generator[StepReport, None, Adapter | None]:
            try:
                first = next(steps)  # by then everything that can be refused has been
            except StopIteration as done:  # resumed after the last step
                return done.value
            interrupts.gentle = True
            if processes.main:
                print_active_settings(resolve_runtime(run.memory), run, why, processes.count, adapter_bytes(built, run))
            yield first
            return (yield from steps)

        try:
            return show_progress(announced(), run) if processes.main else result(announced())
        except KeyboardInterrupt:
            if name in store.unfinished():
                raise Stopped("what was saved before is as it was") from None
            raise


def _processes(run: RunConfig) -> Any:
    from ...core.runtime import Processes, resolve_runtime

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Processes()
    from accelerate import PartialState

    processes = Processes(PartialState(cpu=resolve_runtime(run.memory).device.type == "cpu"))
    if processes.count != started:
        raise ImagicError(
            f"{started} processes that cannot talk to each other", "one device for each", "start fewer with accelerate launch"
        )
    return processes


def _slug(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "photo"
