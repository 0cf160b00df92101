"""Saves, stops and resumes the stages of a fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.record import PREVIEWS
from ...core.conditioning import Conditioning
from ...core.errors import ImagicError, ImagicWarning, NotFinite, Stopped
from ...core.settings.merging import differences
from ...memory.limits import OutOfMemory
from ...memory.out_of_memory import explain_out_of_memory
from ..monitoring.convergence import PREFIX as CONVERGENCE_PREFIX
from ..monitoring.previews import PREFIX as PREVIEWS_PREFIX
from ..run import Run
from ..stage import OPTIMIZER, TRAINABLE, Batch, Progress, Stage, train
from .checkpoints import START_OVER, Checkpoint, CheckpointRecord, Checkpoints
from .interrupting import stop_while_sampling

_LATENTS_TOLERANCE = 0.05  # relative error: memory levers and devices cause far less, another VAE causes more


@dataclass
class ResumableStages:
    """Wraps the training loop of every stage of a run: saves checkpoints, stops, and resumes from a checkpoint.

    Args:
        run: the run whose stages are driven.
        saved: the checkpoints of the run.
        stop: called after every step and while previews are sampled; True stops the run.
        saved_message: says what the newest checkpoint holds and how to resume; empty before the first one.
        last_save: time of the last save, in seconds of :func:`time.perf_counter`.
        stop_requested: whether ``stop`` has returned True.
    """

    run: Run
    saved: Checkpoints
    stop: Callable[[], bool]
    saved_message: str = ""
    last_save: float = field(default_factory=time.perf_counter)
    stop_requested: bool = False

    def is_stopping(self) -> bool:
        """Returns whether the run stops. A request of ``stop`` stays, so that one during a preview also ends the training."""
        self.stop_requested = self.stop_requested or self.stop()
        return self.stop_requested

    def run_stage(
        self, stage: Stage, start: int, checkpoint: Checkpoint | None, extra_tensors: Mapping[str, Tensor] | None = None
    ) -> Generator[Progress, None, None]:
        """Runs a stage, records its losses, relative losses, previews and its duration, and saves checkpoints.

        The stage ends after its last step, or early if its relative loss no longer falls.

        Args:
            stage: the stage to run.
            start: number of steps that are already finished in ``checkpoint``; 0 without one.
            checkpoint: the state to start from, or None for a new stage.
            extra_tensors: tensors that are added to every checkpoint of the stage.

        Yields:
            A report after every step; and the batches of a run that shares them.

        Raises:
            Stopped: ``stop`` returned True; a checkpoint is saved.
            NotFinite: a loss, a gradient or a trainable is NaN or infinite; the previous checkpoint still exists.
            ImagicError: memory runs out, or the disk is full.
        """
        run, step, stage.shared = self.run, start, self.run.shared
        if checkpoint:
            stage.load_state_dict(checkpoint.tensors)
        losses = run.losses.setdefault(stage.name, [])
        started = time.perf_counter() - run.seconds.get(stage.name, 0.0)
        try:
            with explain_out_of_memory(run.base.architecture, run.config, run.base.runtime, stage.name, lambda: self.saved_message):
                reports = run.convergence.observed(train(stage, start, self.is_stopping), stage)
                for report in reports if stage.name == "embed" else self._with_previews(reports, stage, start):
                    if isinstance(report, Batch):
                        yield report
                        continue
                    assert report.loss is not None, "a stage trains"
                    losses.append(report.loss)
                    step = report.step
                    run.seconds[stage.name] = round(time.perf_counter() - started, 3)
                    yield report
                    if not self._is_finished(stage, step) and self._is_due(step):
                        self._save(stage, step, extra_tensors)
        except GeneratorExit:
            self._save(stage, step, extra_tensors)
            raise
        except NotFinite as error:
            raise self._with_saved_message(error) from error
        if step > start or not checkpoint:
            self._save(stage, step, extra_tensors)
        if not self._is_finished(stage, step) or run.processes.any(self.is_stopping()):
            raise Stopped(self.saved_message)

    def _is_finished(self, stage: Stage, step: int) -> bool:
        return step == stage.config.steps or self.run.convergence.stopped(stage.name)

    def _with_previews(self, reports: Iterator[Progress], stage: Stage, start: int) -> Iterator[Progress]:
        """Makes the previews that are due, on the main process, and adds the path of their sheet to the reports.

        A preview that a stop interrupted is made when the run is resumed, so that the adapter has it.
        """
        if self.run.processes.main and self.run.previews.is_due(start):
            self._preview(stage, start)
        for report in reports:
            if not isinstance(report, Batch) and self.run.processes.main and self.run.previews.is_due(report.step):
                report = replace(report, preview=self._preview(stage, report.step))
            yield report

    def _preview(self, stage: Stage, step: int) -> Path | None:
        """Generates the strip of a step and writes the sheet of all strips beside the checkpoints.

        If memory runs out, there are no more previews, with a warning. If the sheet cannot be written, a warning is issued.

        Returns:
            The path of the sheet; None if it was not written.
        """
        run = self.run
        try:
            explained = explain_out_of_memory(run.base.architecture, run.config, run.base.runtime, "preview")
            with explained, stop_while_sampling(run.base, self.is_stopping):
                run.previews.add(step, run.images(stage.conditioning(), run.previews.etas))
            return self.saved.write_picture(PREVIEWS, run.previews_png() or b"")
        except Stopped:
            return None  # the training loop stops after this step
        except OutOfMemory as error:
            run.previews.every = 0
            warnings.warn(f"there are no more previews during this fit: {error}", ImagicWarning, stacklevel=2)
        except ImagicError as error:
            warnings.warn(f"the previews of step {step} are not shown: {error}", ImagicWarning, stacklevel=2)
        finally:
            run.base.offload_encoders()
        return None

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
        done = {stage: len(losses) for stage, losses in run.losses.items()}
        valid = run.convergence.load_state_dict(checkpoint.tensors, done, latents.device)
        valid = valid and run.previews.load_state_dict(checkpoint.tensors, done.get("tune", 0))
        if not valid or run.convergence.stopped(record.stage) != record.stopped_early:
            got = "the relative losses or previews in the checkpoint do not fit this run"
            raise ImagicError(got, "a checkpoint of the same run", START_OVER)
        if record.stage == "embed":
            return None, record.step
        return Conditioning.from_tensors(checkpoint.group("optimised")).to(latents.device), record.step

    def check_inputs(self, checkpoint: Checkpoint) -> None:
        """Raises ImagicError if a checkpoint is of other inputs, before the class pictures of this run are made."""
        record, present = checkpoint.record, self.run.inputs(checkpoint.record.stage, checkpoint.record.finished)
        before = {name: value for name, value in record.inputs.items() if name != "class_pictures"}
        self._raise_for(differences(before, present))

    def _check_same_run(self, checkpoint: Checkpoint, latents: Tensor) -> None:
        """Raises ImagicError if a checkpoint, or the latents in it, belong to another run."""
        run, record = self.run, checkpoint.record
        mismatches = differences(record.inputs, run.inputs(record.stage, record.finished))
        if record.stage not in run.config.stages:
            mismatches = [f"it was in stage {record.stage}, which --mode {run.config.tune.mode} does not have"]
        if not mismatches and not self._has_expected_tensors(checkpoint):
            mismatches = ["the checkpoint holds other tensors than this run saves"]
        if not mismatches and (latents - run.latents).norm() > _LATENTS_TOLERANCE * latents.norm():
            mismatches = ["the latents of the photo differ (another VAE?)"]
        self._raise_for(mismatches)

    @staticmethod
    def _raise_for(mismatches: Sequence[str]) -> None:
        if mismatches:
            got = f"this run differs from the one that was interrupted: {'; '.join(mismatches)}"
            raise ImagicError(got, "the same photo, target prompt, base and settings", f"use those of the interrupted run, or {START_OVER}")

    def _has_expected_tensors(self, checkpoint: Checkpoint) -> bool:
        """Returns whether a checkpoint holds the tensors that :meth:`_save` writes, in the right shapes; latents and losses are real.

        Trainables and optimizer states are checked by :meth:`Stage.load_state_dict`, what was monitored by :meth:`resume`.
        """
        run, record = self.run, checkpoint.record
        expected = {"latents": tuple(run.latents.shape), f"losses/{record.stage}": (record.step,)}
        if record.stage == "tune":
            if "embed" in run.config.stages:
                expected["losses/embed"] = self._finished_losses(checkpoint)
            expected |= {f"optimised/{name}": tuple(value.shape) for name, value in run.target.tensors().items()}
        tensors, others = checkpoint.tensors, (TRAINABLE, OPTIMIZER, CONVERGENCE_PREFIX, PREVIEWS_PREFIX)
        shapes = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith(others)}
        finished = not any(name.startswith(OPTIMIZER) for name in tensors)
        real = all(value.is_floating_point() for name, value in tensors.items() if name == "latents" or name.startswith("losses/"))
        return shapes == expected and real and finished == record.finished

    def _finished_losses(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Returns the expected shape of the losses of stage embed once it is finished; early stopping may have shortened it."""
        steps, losses = self.run.config.embed.steps, checkpoint.tensors.get("losses/embed")
        early = self.run.config.stops_early("embed") and losses is not None and losses.dim() == 1 and 1 <= len(losses) <= steps
        return (len(losses),) if early and losses is not None else (steps,)

    def _is_due(self, step: int) -> bool:
        interval = self.run.config.checkpoint
        return time.perf_counter() - self.last_save >= interval.seconds or (interval.steps is not None and step % interval.steps == 0)

    def _save(self, stage: Stage, step: int, extra_tensors: Mapping[str, Tensor] | None) -> None:
        """Saves a checkpoint of a stage, on the main process only; without optimizer states if the stage is finished."""
        run = self.run
        if not run.processes.main or step == 0:
            return
        finished = self._is_finished(stage, step)
        state = {name: value for name, value in stage.state_dict().items() if not (finished and name.startswith(OPTIMIZER))}
        losses = {f"losses/{name}": torch.stack(values) for name, values in run.losses.items() if values}
        record = CheckpointRecord(
            stage=stage.name,  # pyright: ignore[reportArgumentType]  # one of the two
            step=step,
            steps=stage.config.steps,
            inputs=run.inputs(stage.name, finished),
            seconds=run.seconds,
            threads=torch.get_num_threads(),
            stopped_early=finished and step < stage.config.steps,
        )
        monitored = run.convergence.state_dict() | run.previews.state_dict()
        try:
            stage.check()
            self.saved.save(record, {"latents": run.latents, **state, **losses, **monitored, **(extra_tensors or {})})
        except NotFinite as error:
            raise self._with_saved_message(error) from error
        self._set_saved_message(stage.name, step, stage.config.steps)
        self.last_save = time.perf_counter()

    def _set_saved_message(self, stage: str, step: int, steps: int) -> None:
        self.saved_message = f"{step} of {steps} steps of stage {stage} are saved; run the same command with --resume to continue"
