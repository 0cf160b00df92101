"""fit(): a photo and a sentence to a stored adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from torch.nn import Parameter

from ..adapters.adapter import Adapter
from ..adapters.atomic import writable
from ..adapters.full import refuse_half, unfrozen
from ..adapters.lora import attached
from ..adapters.store import Store
from ..bases.base import Base
from ..bases.loading.registry import architecture_of, open_base
from ..core.config import RunConfig
from ..core.errors import ImagicError, Stopped
from ..core.noise import key
from ..core.processes import Processes
from ..core.runtime import Runtime, free_memory, reset_peak_memory, resolve_runtime
from ..memory.limits import refuse_full_disk, refuse_if_too_large
from ..memory.out_of_memory import assumed_from
from ..photos.reading import read_photo
from ..sampling.checks import refuse_empty, refuse_no_steps
from .checkpoints import Checkpoint, Checkpoints
from .embed import embed_stage, optimised
from .optimizers import refuse_several
from .run import Run
from .saving import _Stages
from .stage import StepReport
from .tune import tune_stage

Value = TypeVar("Value")


def open_for(config: RunConfig, runtime: Runtime | None = None) -> Base:
    """The base of a run, in the precision its mode needs.

    Raises:
        ImagicError: no such base, or a run that does not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    refuse_if_too_large(architecture_of(config.base, config.revision), config, free_memory(runtime.device), assumed_from(runtime))
    return open_base(config.base, runtime, config.revision, master_weights=config.tune.mode == "full")


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

    A generator: it does its work as it is iterated. :func:`result` runs one to its end. A base that is given is left bit-equal to before;
    one that is opened here is let go afterwards.

    What was trained is not lost: it is saved now and then, at the end of a stage, when ``stop`` says so, and when the generator is closed.
    An adapter whose preview cannot be made for lack of memory is stored without one, with a warning.

    Args:
        image: file of the photo.
        prompt: what the edited photo shows.
        name: of the adapter in the store.
        base: already loaded; opened by ``config`` where not given.
        overwrite: an adapter and an unfinished fit of the same name.
        resume: goes on from the newest checkpoint of that name that is whole. On the CPU, with as many threads as before, the outcome is
            that of a run that was never interrupted, byte for byte.
        stop: asked after every step; with several processes all stop after the same one.

    Yields:
        A report of every step.

    Returns:
        The adapter, or None on processes other than the main one, which do not write.

    Raises:
        Stopped: ``stop`` said so; what was trained is saved.
        ImagicError: an empty prompt, a name that is taken or being written, a strength without steps, an unreadable photo, a base that
            cannot be had, too little memory or disk, nothing whole to resume, another run than the one interrupted, numbers that are not
            finite.
    """
    processes = processes or Processes()
    refuse_empty(prompt)
    refuse_no_steps(config.edit)
    saved = Checkpoints(store.checkpoints(name))
    with store.claimed(name) if processes.main else nullcontext(store) as store:
        if processes.main:
            _prepare(store, name, saved, overwrite, resume)
        found = _found(saved, name, processes) if resume else None
        photo = read_photo(image)
        restore = base is not None
        if base is None:
            base = open_for(config)
        else:
            config = config.model_copy(update={"memory": base.runtime.memory})  # it has levers of its own
        if config.memory.optimizer_in_backward:
            refuse_several(processes)
        if config.tune.mode == "full":
            refuse_half(base)
        if processes.main:
            refuse_full_disk(base.architecture, config, assumed_from(base.runtime), store.root, saved.size)
        reset_peak_memory(base.runtime.device)
        run = Run(config, base, photo, prompt, processes)
        if processes.main and not resume:
            with writable(store.root):
                saved.clear()  # only now that nothing is refused any more
        stages = _Stages(run, saved, stop)
        e_opt, start = stages.taken_up(found) if found else (None, 0)
        if e_opt is None:
            embed = embed_stage(base, run.latents, run.target, config.embed, config.seed, processes)
            yield from stages.follow(embed, start, found)
            e_opt, start, found = optimised(embed), 0, None
            del embed
        with _trainables(run, restore) as parameters:
            tune = tune_stage(base, run.latents, e_opt, parameters, config.tune, config.seed, processes)
            yield from stages.follow(tune, start, found, {f"optimised/{name}": value for name, value in e_opt.tensors().items()})
            del tune, found  # and with them the optimiser's states, before pictures need room
            if not processes.main:
                return None
            with _heeding(base, stop, stages.kept):
                preview = run.preview(e_opt)
            adapter = store.write(run.record(name), lambda draft: run.fill(draft, e_opt, preview), overwrite)
        with suppress(OSError):  # what stays is in nobody's way
            saved.clear()
    return adapter


def _prepare(store: Store, name: str, saved: Checkpoints, overwrite: bool, resume: bool) -> None:
    """Refuses a name that is taken, by an adapter or by an unfinished fit, unless it is asked for."""
    store.prepare(name, overwrite)
    if saved.any() and not resume and not overwrite:
        got = f"an unfinished fit of {name} is in {saved.folder}"
        raise ImagicError(got, "to go on with it, or to begin anew", "add --resume, or --overwrite")


def _found(saved: Checkpoints, name: str, processes: Processes) -> Checkpoint:
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
def _heeding(base: Base, stop: Callable[[], bool], kept: str) -> Iterator[None]:
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
