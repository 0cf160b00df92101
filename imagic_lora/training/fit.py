"""fit(): a photo and a sentence to a stored adapter."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..adapters.adapter import Adapter
from ..adapters.atomic import writable
from ..adapters.full import refuse_half, unfrozen
from ..adapters.lora import attached
from ..adapters.store import Store
from ..bases.base import Base
from ..bases.loading.registry import architecture_of, open_base
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.errors import ImagicError, ImagicWarning, NotFinite, Stopped
from ..core.runtime import Processes, Runtime, free_memory, key, reset_peak_memory, resolve_runtime
from ..memory.presets import assumed_from, explained, refuse_full_disk, refuse_if_too_large
from ..photos.reading import read_photo
from ..sampling.generate import refuse_empty, refuse_no_steps
from .checkpoints import Checkpoint, CheckpointRecord, Checkpoints, differences
from .embed import embed_stage, optimised
from .optimizers import refuse_several
from .run import Run
from .stage import OPTIMIZER, TRAINABLE, Stage, StepReport, train
from .tune import tune_stage

_SAME_LATENTS = 0.05  # relative: levers and devices differ by far less, another VAE by more
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


@dataclass
class _Stages:
    """Drives the stages of a run and saves what they come to."""

    run: Run
    saved: Checkpoints
    stop: Callable[[], bool]
    kept: str = ""
    last: float = field(default_factory=time.perf_counter)

    def follow(
        self, stage: Stage, start: int, found: Checkpoint | None, more: Mapping[str, Tensor] | None = None
    ) -> Generator[StepReport, None, None]:
        """Passes the reports of a stage on, keeping its losses and its time.

        Args:
            start: steps that are done already, by the state in ``found``.
            more: goes into its checkpoints.

        Raises:
            Stopped: after a step that ``stop`` spoke up in.
        """
        run, step, steps = self.run, start, stage.config.steps
        if found:
            stage.load_state_dict(found.tensors)
        losses = run.losses.setdefault(stage.name, [])
        begun = time.perf_counter() - run.seconds.get(stage.name, 0.0)
        try:
            with explained(run.base.architecture, run.config, run.base.runtime, stage.name, lambda: self.kept):
                for report in train(stage, start, self.stop):
                    losses.append(report.loss)
                    step = report.step
                    run.seconds[stage.name] = round(time.perf_counter() - begun, 3)
                    yield report
                    if step < steps and self._due(step):
                        self._save(stage, step, more)
        except GeneratorExit:
            self._save(stage, step, more)
            raise
        except NotFinite as error:
            raise self._with_kept(error) from error
        if step > start or not found:
            self._save(stage, step, more)
        if step < steps or run.processes.any(self.stop()):
            raise Stopped(self.kept)

    def _with_kept(self, error: NotFinite) -> NotFinite:
        """Says once what is saved."""
        got = error.got if not self.kept or self.kept in error.got else f"{error.got}; {self.kept}"
        return NotFinite(got, error.expected, error.remedy)

    def taken_up(self, found: Checkpoint) -> tuple[Conditioning | None, int]:
        """Takes losses, times and latents from a checkpoint; gives the optimised embedding, if it was that far, and the steps done.

        Raises:
            ImagicError: it is of another run.
        """
        run, record = self.run, found.record
        other = differences(record.inputs, run.inputs(record.stage, finished=record.step == record.steps))
        if not other and not self._whole(found):
            other = ["what it holds does not fit"]
        latents = found.tensors.get("latents", run.latents).to(run.latents)
        if not other and (latents - run.latents).norm() > _SAME_LATENTS * latents.norm():
            other = ["the photo's latents are others (another VAE?)"]
        if other:
            got, expected = f"another run than the one interrupted: {'; '.join(other)}", "the same photo, sentence, base and settings"
            raise ImagicError(got, expected, "give what was given then, or begin anew with --overwrite and without --resume")
        threads = torch.get_num_threads()
        if run.base.runtime.device.type == "cpu" and threads != record.threads:
            message = f"the fit was begun on {record.threads} threads and goes on on {threads}: its last digits may differ"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        run.latents = latents
        run.losses = {stage: list(losses.to(latents.device)) for stage, losses in found.group("losses").items()}
        run.seconds = dict(record.seconds)
        self._keep(record.stage, record.step, record.steps)
        if record.stage == "embed":
            return None, record.step
        return Conditioning.from_tensors(found.group("optimised")).to(latents.device), record.step

    def _whole(self, found: Checkpoint) -> bool:
        """Whether a checkpoint holds what :meth:`_save` puts into one, in the right shapes; the stage looks after its own state."""
        run, record = self.run, found.record
        expected = {"latents": tuple(run.latents.shape), f"losses/{record.stage}": (record.step,)}
        if record.stage == "tune":
            expected["losses/embed"] = (run.config.embed.steps,)
            expected |= {f"optimised/{name}": tuple(value.shape) for name, value in run.target.tensors().items()}
        rest = {name: tuple(value.shape) for name, value in found.tensors.items() if not name.startswith((TRAINABLE, OPTIMIZER))}
        finished = not any(name.startswith(OPTIMIZER) for name in found.tensors)
        return rest == expected and finished == (record.step == record.steps)

    def _due(self, step: int) -> bool:
        every = self.run.config.checkpoint
        return time.perf_counter() - self.last >= every.seconds or (every.steps is not None and step % every.steps == 0)

    def _save(self, stage: Stage, step: int, more: Mapping[str, Tensor] | None) -> None:
        """Saves a stage as it is after a step; of a finished one only what it came to."""
        run = self.run
        if not run.processes.main or step == 0:
            return
        finished = step == stage.config.steps
        state = {name: value for name, value in stage.state_dict().items() if not (finished and name.startswith(OPTIMIZER))}
        losses = {f"losses/{name}": torch.stack(values) for name, values in run.losses.items() if values}
        record = CheckpointRecord(
            stage=stage.name,  # pyright: ignore[reportArgumentType]  # one of the two
            step=step,
            steps=stage.config.steps,
            inputs=run.inputs(stage.name, finished),
            seconds=run.seconds,
            threads=torch.get_num_threads(),
        )
        try:
            stage.check()
            self.saved.save(record, {"latents": run.latents, **state, **losses, **(more or {})})
        except NotFinite as error:
            raise self._with_kept(error) from error
        self._keep(stage.name, step, stage.config.steps)
        self.last = time.perf_counter()

    def _keep(self, stage: str, step: int, steps: int) -> None:
        self.kept = f"{step} of {steps} steps of stage {stage} are saved, and the same command with --resume goes on from there"


def result(steps: Generator[StepReport, None, Value]) -> Value:
    """Runs a fit to its end and gives what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
