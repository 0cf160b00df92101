"""Saving, stopping and resuming the stages of a fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import ImagicError, ImagicWarning, NotFinite, Stopped
from ..memory.out_of_memory import explain_out_of_memory
from .checkpoints import Checkpoint, CheckpointRecord, Checkpoints, differences
from .run import Run
from .stage import OPTIMIZER, TRAINABLE, Stage, StepReport, train

_SAME_LATENTS = 0.05  # relative: levers and devices differ by far less, another VAE by more


@dataclass
class ResumableStages:
    """Drives the stages of a run and saves what they come to."""

    run: Run
    saved: Checkpoints
    stop: Callable[[], bool]
    kept: str = ""
    last: float = field(default_factory=time.perf_counter)

    def run_stage(
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
            with explain_out_of_memory(run.base.architecture, run.config, run.base.runtime, stage.name, lambda: self.kept):
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

    def resume(self, found: Checkpoint) -> tuple[Conditioning | None, int]:
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
