"""Saves, stops and resumes the stages of a fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import ImagicError, ImagicWarning, NotFinite, Stopped
from ..core.settings import differences
from ..memory.out_of_memory import explain_out_of_memory
from .checkpoints import START_OVER, Checkpoint, CheckpointRecord, Checkpoints
from .run import Run
from .stage import OPTIMIZER, TRAINABLE, Stage, StepReport, train

_LATENTS_TOLERANCE = 0.05  # relative error: memory levers and devices cause far less, another VAE causes more


@dataclass
class ResumableStages:
    """Wraps the training loop of every stage of a run: saves checkpoints, stops, and resumes from a checkpoint.

    Args:
        run: the run whose stages are driven.
        saved: the checkpoints of the run.
        stop: called after every step; True stops the run.
        saved_message: says what the newest checkpoint holds and how to resume; empty before the first one.
        last_save: time of the last save, in seconds of :func:`time.perf_counter`.
    """

    run: Run
    saved: Checkpoints
    stop: Callable[[], bool]
    saved_message: str = ""
    last_save: float = field(default_factory=time.perf_counter)

    def run_stage(
        self, stage: Stage, start: int, checkpoint: Checkpoint | None, extra_tensors: Mapping[str, Tensor] | None = None
    ) -> Generator[StepReport, None, None]:
        """Runs a stage, records its losses and its duration, and saves checkpoints.

        Args:
            stage: the stage to run.
            start: number of steps that are already finished in ``checkpoint``; 0 without one.
            checkpoint: the state to start from, or None for a new stage.
            extra_tensors: tensors that are added to every checkpoint of the stage.

        Yields:
            A report after every step.

        Raises:
            Stopped: ``stop`` returned True; a checkpoint is saved.
            NotFinite: a loss, a gradient or a trainable is NaN or infinite; the previous checkpoint still exists.
            ImagicError: memory runs out, or the disk is full.
        """
        run, step, steps = self.run, start, stage.config.steps
        if checkpoint:
            stage.load_state_dict(checkpoint.tensors)
        losses = run.losses.setdefault(stage.name, [])
        started = time.perf_counter() - run.seconds.get(stage.name, 0.0)
        try:
            with explain_out_of_memory(run.base.architecture, run.config, run.base.runtime, stage.name, lambda: self.saved_message):
                for report in train(stage, start, self.stop):
                    losses.append(report.loss)
                    step = report.step
                    run.seconds[stage.name] = round(time.perf_counter() - started, 3)
                    yield report
                    if step < steps and self._is_due(step):
                        self._save(stage, step, extra_tensors)
        except GeneratorExit:
            self._save(stage, step, extra_tensors)
            raise
        except NotFinite as error:
            raise self._with_saved_message(error) from error
        if step > start or not checkpoint:
            self._save(stage, step, extra_tensors)
        if step < steps or run.processes.any(self.stop()):
            raise Stopped(self.saved_message)

    def _with_saved_message(self, error: NotFinite) -> NotFinite:
        """Returns the error with what is saved added to it, unless it already contains that."""
        message = self.saved_message
        got = error.got if not message or message in error.got else f"{error.got}; {message}"
        return NotFinite(got, error.expected, error.remedy)

    def resume(self, checkpoint: Checkpoint) -> tuple[Conditioning | None, int]:
        """Restores losses, durations and latents of the run from a checkpoint.

        Returns:
            The optimised embedding ``e_opt``, or None if the checkpoint belongs to stage embed; and the number of finished steps.

        Raises:
            ImagicError: the checkpoint belongs to another run.
        """
        run, record = self.run, checkpoint.record
        latents = checkpoint.tensors.get("latents", run.latents).to(run.latents)
        self._check_same_run(checkpoint, latents)
        threads = torch.get_num_threads()
        if run.base.runtime.device.type == "cpu" and threads != record.threads:
            message = f"the fit started on {record.threads} CPU threads and resumes on {threads}: the last digits of the result may differ"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        run.latents = latents
        run.losses = {stage: list(losses.to(latents.device)) for stage, losses in checkpoint.group("losses").items()}
        run.seconds = dict(record.seconds)
        self._set_saved_message(record.stage, record.step, record.steps)
        if record.stage == "embed":
            return None, record.step
        return Conditioning.from_tensors(checkpoint.group("optimised")).to(latents.device), record.step

    def _check_same_run(self, checkpoint: Checkpoint, latents: Tensor) -> None:
        """Raises ImagicError if a checkpoint, or the latents in it, belong to another run."""
        run, record = self.run, checkpoint.record
        mismatches = differences(record.inputs, run.inputs(record.stage, finished=record.step == record.steps))
        if record.stage not in run.config.stages:
            mismatches = [f"it was in stage {record.stage}, which --mode {run.config.tune.mode} does not have"]
        if not mismatches and not self._has_expected_tensors(checkpoint):
            mismatches = ["the checkpoint holds other tensors than this run saves"]
        if not mismatches and (latents - run.latents).norm() > _LATENTS_TOLERANCE * latents.norm():
            mismatches = ["the latents of the photo differ (another VAE?)"]
        if mismatches:
            got = f"this run differs from the one that was interrupted: {'; '.join(mismatches)}"
            raise ImagicError(got, "the same photo, target prompt, base and settings", f"use those of the interrupted run, or {START_OVER}")

    def _has_expected_tensors(self, checkpoint: Checkpoint) -> bool:
        """Returns whether a checkpoint holds the tensors that :meth:`_save` writes, in the right shapes.

        Trainables and optimizer states are checked by :meth:`Stage.load_state_dict`.
        """
        run, record = self.run, checkpoint.record
        expected = {"latents": tuple(run.latents.shape), f"losses/{record.stage}": (record.step,)}
        if record.stage == "tune":
            expected["losses/embed"] = (run.config.embed.steps,)
            expected |= {f"optimised/{name}": tuple(value.shape) for name, value in run.target.tensors().items()}
        tensors = checkpoint.tensors
        shapes = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith((TRAINABLE, OPTIMIZER))}
        finished = not any(name.startswith(OPTIMIZER) for name in tensors)
        return shapes == expected and finished == (record.step == record.steps)

    def _is_due(self, step: int) -> bool:
        interval = self.run.config.checkpoint
        return time.perf_counter() - self.last_save >= interval.seconds or (interval.steps is not None and step % interval.steps == 0)

    def _save(self, stage: Stage, step: int, extra_tensors: Mapping[str, Tensor] | None) -> None:
        """Saves a checkpoint of a stage, on the main process only; without optimizer states if the stage is finished."""
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
            self.saved.save(record, {"latents": run.latents, **state, **losses, **(extra_tensors or {})})
        except NotFinite as error:
            raise self._with_saved_message(error) from error
        self._set_saved_message(stage.name, step, stage.config.steps)
        self.last_save = time.perf_counter()

    def _set_saved_message(self, stage: str, step: int, steps: int) -> None:
        self.saved_message = f"{step} of {steps} steps of stage {stage} are saved; run the same command with --resume to continue"
