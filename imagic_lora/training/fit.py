"""fit(): a photo and a sentence to a stored adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from torch.nn import Parameter

from ..adapters.adapter import Adapter
from ..adapters.atomic import writable
from ..adapters.full import check_master_weights, unfrozen
from ..adapters.lora import attached
from ..adapters.store import Store
from ..bases.base import Base
from ..bases.loading.registry import architecture_of, load_base
from ..core.config import RunConfig
from ..core.errors import ImagicError, Stopped
from ..core.noise import key
from ..core.runtime import Processes, Runtime, free_memory, reset_peak_memory, resolve_runtime
from ..memory.limits import check_disk, check_memory
from ..memory.out_of_memory import assumed_from
from ..photos.reading import read_photo
from ..sampling.checks import check_prompt, check_strength
from .checkpoints import Checkpoint, Checkpoints
from .embed import embed_stage, optimised
from .optimizers import check_single_process
from .run import Run, encode_run
from .saving import ResumableStages
from .stage import StepReport
from .tune import tune_stage

Value = TypeVar("Value")


def open_base(config: RunConfig, runtime: Runtime | None = None) -> Base:
    """The base of a run, in the precision its mode needs.

    Raises:
        ImagicError: no such base, or a run that does not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    check_memory(architecture_of(config.base, config.revision), config, free_memory(runtime.device), assumed_from(runtime))
    return load_base(config.base, runtime, config.revision, master_weights=config.tune.mode == "full")


def fit(
    image: Path,
    prompt: str,
    config: RunConfig,
    store: Store,
    name: str,
    *,
    base: Base | None = None,
    overwrite: bool = False,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> Generator[StepReport, None, Adapter | None]:
    """Both training stages, a preview, and the stored adapter (Imagic, arXiv 2210.09276).

    A generator: it works as it is iterated, and :func:`result` runs it to its end. What was trained is saved regularly, at the end of a
    stage, when ``stop`` returns True, and when the generator is closed. An adapter whose preview does not fit the memory is stored without
    one, with a warning.

    Args:
        image: file of the photo.
        prompt: the target prompt: what the edited photo shows.
        name: of the adapter in the store.
        base: already loaded, and bit-equal to before afterwards; by default ``config`` says which to open, and it is released afterwards.
        overwrite: replaces an adapter and an unfinished fit of the same name.
        resume: continues from the newest whole checkpoint of that name. On the CPU, with as many threads as before, the result is that of
            an uninterrupted run, byte for byte.
        stop: called after every step; with several processes all stop after the same one.

    Yields:
        A report of every step.

    Returns:
        The adapter, or None on processes other than the main one, which do not write.

    Raises:
        Stopped: ``stop`` returned True; what was trained is saved.
        ImagicError: bad arguments, too little memory or disk, nothing to resume, or numbers that are not finite.
    """
    processes = processes or Processes()
    check_prompt(prompt)
    check_strength(config.edit)
    saved = Checkpoints(store.checkpoints(name))
    with store.locked(name) if processes.main else nullcontext(store) as store:
        if processes.main:
            _check_name(store, name, saved, overwrite, resume)
        found = _checkpoint_to_resume(saved, name, processes) if resume else None
        photo = read_photo(image)
        opened, config = _open_checked(base, config, processes, store, saved)
        run = encode_run(config, opened, photo, prompt, processes)
        if processes.main and not resume:
            with writable(store.root):
                saved.clear()  # only now, when every check has passed
        adapter = yield from _train_and_store(ResumableStages(run, saved, stop), found, store, name, overwrite, restore=base is not None)
        if processes.main:
            with suppress(OSError):  # left-over checkpoints do no harm
                saved.clear()
    return adapter


def _open_checked(base: Base | None, config: RunConfig, processes: Processes, store: Store, saved: Checkpoints) -> tuple[Base, RunConfig]:
    """The base, and the settings with its memory levers; checked before anything is trained."""
    if base is None:
        base = open_base(config)
    config = config.model_copy(update={"memory": base.runtime.memory})
    if config.memory.optimizer_in_backward:
        check_single_process(processes)
    if config.tune.mode == "full":
        check_master_weights(base)
    if processes.main:
        check_disk(base.architecture, config, assumed_from(base.runtime), store.root, saved.size)
    reset_peak_memory(base.runtime.device)
    return base, config


def _train_and_store(
    stages: ResumableStages, found: Checkpoint | None, store: Store, name: str, overwrite: bool, restore: bool
) -> Generator[StepReport, None, Adapter | None]:
    """Both stages, from the checkpoint if there is one; on the main process the preview and the stored adapter."""
    run = stages.run
    base, config, processes = run.base, run.config, run.processes
    e_opt, start = stages.resume(found) if found else (None, 0)
    if e_opt is None:
        embed = embed_stage(base, run.latents, run.target, config.embed, config.seed, processes)
        yield from stages.run_stage(embed, start, found)
        e_opt, start, found = optimised(embed), 0, None
        del embed
    with _trainables(run, restore) as parameters:
        tune = tune_stage(base, run.latents, e_opt, parameters, config.tune, config.seed, processes)
        yield from stages.run_stage(tune, start, found, {f"optimised/{name}": value for name, value in e_opt.tensors().items()})
        del tune, found  # and with them the optimizer's states, before the preview needs memory
        if not processes.main:
            return None
        with _stoppable(base, stages.stop, stages.kept):
            preview = run.preview(e_opt)
        return store.write(run.record(name), lambda writer: run.fill(writer, e_opt, preview), overwrite)


def _check_name(store: Store, name: str, saved: Checkpoints, overwrite: bool, resume: bool) -> None:
    """Refuses a name that is taken, by an adapter or by an unfinished fit, unless it is asked for."""
    store.check_free(name, overwrite)
    if saved.any() and not resume and not overwrite:
        got = f"an unfinished fit of {name} is in {saved.folder}"
        raise ImagicError(got, "to go on with it, or to begin anew", "add --resume, or --overwrite")


def _checkpoint_to_resume(saved: Checkpoints, name: str, processes: Processes) -> Checkpoint:
    found = saved.newest(processes.main)
    if found is None:
        kind = "whole checkpoint" if saved.any() else "checkpoint"
        raise ImagicError(f"there is no {kind} of {name} to resume", "an interrupted fit", "leave out --resume to begin anew")
    return found


def _trainables(run: Run, restore: bool) -> AbstractContextManager[dict[str, Parameter]]:
    if run.config.tune.mode == "full":
        return unfrozen(run.base, restore)
    return attached(run.base, run.config.tune, key(run.config.seed, "lora"))


@contextmanager
def _stoppable(base: Base, stop: Callable[[], bool], kept: str) -> Iterator[None]:
    """Pictures take a while too: ``stop`` is asked at every step of the sampler."""

    def look(*_: object) -> None:
        if stop():
            raise Stopped(kept)

    hook = base.denoiser.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def result(steps: Generator[StepReport, None, Value]) -> Value:
    """Runs a fit to its end and gives what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
