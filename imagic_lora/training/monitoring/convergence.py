"""The relative loss: a sign of convergence that does not jump with the noise of a step, and early stopping by it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...core.config import RunConfig
from ...core.errors import NotFinite
from ...core.noise import noise_at, times_at
from ...core.runtime import Processes, to_device
from ...photos.plot import Curve, plot
from ..stage import Batch, Progress, Stage, StepReport, cycled

PAIRS = 8
"""Number of pairs of timestep and noise at which the relative loss is evaluated; the times are evenly spread."""
PREFIX = "convergence/"
"""Start of the names of the tensors of :meth:`Convergence.state_dict`."""
_KEY = "convergence"  # stands for the stage in the noise function, so that the noise differs from that of both stages


@torch.no_grad()
def fixed_losses(base: Base, latents: Tensor, conditioning: Conditioning, seed: int, batch_size: int, calls: int = PAIRS) -> Tensor:
    """Returns the losses at fixed pairs of timestep and noise, which depend on the seed and differ from those of the training.

    With the batch size of a stage this needs less memory than a training step of the stage, because nothing is kept for a backward pass.

    Args:
        base: the base, with or without trained weights.
        latents: latents of the photo, ``[1, C, h, w]``.
        conditioning: conditioning of one image.
        seed: seed of the run.
        batch_size: number of samples in a call of the denoiser.
        calls: the most calls of the denoiser; a memory plan needs one of these equal calls.

    Returns:
        The loss of each pair, ``[PAIRS]`` fp32 unless ``calls`` cuts them off.
    """
    return torch.cat([batch.run() for batch in islice(_fixed_batches(base, latents, conditioning, seed, batch_size), calls)])


def _fixed_batches(base: Base, latents: Tensor, conditioning: Conditioning, seed: int, batch_size: int) -> Iterator[Batch]:
    """Yields the batches of :func:`fixed_losses`."""
    times = times_at(seed, _KEY, 0, range(PAIRS), PAIRS, "stratified")
    for start in range(0, PAIRS, batch_size):
        pairs = range(start, min(start + batch_size, PAIRS))
        noise = to_device(noise_at(seed, _KEY, 0, pairs, tuple(latents.shape[1:])), latents.device)
        yield Batch(base, cycled(latents, 0, pairs, PAIRS), conditioning, noise, times[pairs.start : pairs.stop])


def _shared_losses(batches: Iterable[Batch]) -> Generator[Batch, None, Tensor]:
    """As :func:`fixed_losses`, but yields the batches, for whoever runs them together with those of other fits."""
    losses: list[Tensor] = []
    for batch in batches:
        yield batch
        assert batch.losses is not None, "whoever takes a batch runs it"
        losses.append(batch.losses)
    return torch.cat(losses)


def no_longer_falls(values: Iterable[float], patience: int, min_improvement: float) -> bool:
    """Returns whether the last ``patience`` values or more did not improve the lowest value before them.

    Args:
        values: relative losses in their order.
        patience: number of values in a row.
        min_improvement: a value is an improvement if it is lower than the lowest one so far by more than this.
    """
    lowest, waited = math.inf, 0
    for value in values:
        if value < lowest - min_improvement:
            lowest, waited = value, 0
        else:
            waited += 1
    return waited >= patience


class Convergence:
    """The relative losses of a fit so far.

    The relative loss is the mean over the pairs of ``loss / loss of the frozen base under e_tgt``: 1 before stage 1. A ratio at one
    timestep is the same for every prediction type, so the number can be compared between bases.

    Args:
        config: the settings of the run.

    Attributes:
        frozen: losses of the frozen base under the target prompt, ``[PAIRS]``; None before they are measured.
        values: relative losses by the number of finished steps, for each stage.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.frozen: Tensor | None = None
        self.values: dict[str, dict[int, float]] = {}

    def measure_frozen(
        self, base: Base, latents: Tensor, target: Conditioning, processes: Processes, shared: bool = False
    ) -> Generator[Batch, None, None]:
        """Measures the level of the frozen base, if the relative loss is evaluated and the level is not known yet.

        Args:
            base: the base before any weights of it are trained.
            latents: latents of the photo, ``[1, C, h, w]``.
            target: conditioning of the target prompt, ``e_tgt``.
            processes: the processes of the run.
            shared: whether the batches are yielded instead of run.
        """
        if self.config.monitoring.convergence_every and self.frozen is None:
            pairs = base, latents, target, self.config.seed, next(iter(self.config.stages.values())).batch_size
            losses = (yield from _shared_losses(_fixed_batches(*pairs))) if shared else fixed_losses(*pairs)
            processes.average([losses])
            self.frozen = losses.clamp_min(torch.finfo(torch.float32).tiny)

    def observed(self, reports: Generator[Progress, None, None], stage: Stage) -> Iterator[Progress]:
        """Adds the relative loss to the reports of the steps after which it is evaluated, and ends a stage early. Batches pass through.

        Args:
            reports: the running stage.
            stage: the stage.

        Raises:
            NotFinite: the relative loss is not a finite number.
        """
        if self.stopped(stage.name):  # resumed from the checkpoint of a stage that ended early
            return
        for report in reports:
            if isinstance(report, Batch):
                yield report
                continue
            if self._is_due(report):
                self.values.setdefault(stage.name, {})[report.step] = value = yield from self._evaluate(stage)
                report = replace(report, relative_loss=value, early_stop=self.stopped(stage.name))
            yield report
            if report.early_stop:
                return

    def stopped(self, stage: str) -> bool:
        """Returns whether a stage ends early with the last of its values."""
        steps, settings = self.config.stages[stage].steps, self.config.monitoring
        values = [value for step, value in self.values.get(stage, {}).items() if step < steps]
        if not values or not self.config.stops_early(stage):
            return False
        return no_longer_falls(chain([self._start(stage)], values), settings.patience, settings.min_improvement)

    def _start(self, stage: str) -> float:
        """The relative loss before the first step of a stage, as far as it is known."""
        embed = list(self.values.get("embed", {}).values())
        return 1.0 if stage == next(iter(self.config.stages)) else embed[-1] if embed else math.inf

    def _is_due(self, report: StepReport) -> bool:
        every = self.config.monitoring.convergence_every
        return every > 0 and (report.step % every == 0 or report.step == report.steps)

    def _evaluate(self, stage: Stage) -> Generator[Batch, None, float]:
        """Returns the relative loss of the current state of a stage; yields the batches of one that shares them."""
        assert self.frozen is not None, "measure_frozen() comes before the first stage"
        stage.check()
        with torch.no_grad():
            pairs = stage.base, stage.latents, stage.conditioning(), stage.seed, stage.config.batch_size
        losses = (yield from _shared_losses(_fixed_batches(*pairs))) if stage.shared else fixed_losses(*pairs)
        stage.processes.average([losses])
        value = (losses / self.frozen).mean().item()
        if not math.isfinite(value):
            got = f"the relative loss of stage {stage.name} is not a finite number"
            raise NotFinite(got, "a finite number", f"try --dtype fp32 or bf16, or a lower --{stage.name}.learning-rate")
        return value

    def picture(self) -> Image.Image | None:
        """Draws the relative loss over the steps of all stages; None if it was never evaluated."""
        curves, before = [], 0
        for number, (stage, values) in enumerate(self.values.items(), start=1):
            start = self._start(stage)
            points = [(before, start)] if math.isfinite(start) else []
            points += [(before + step, value) for step, value in values.items()]
            curves.append(Curve(f"stage {number}: {stage}", points))
            before += max(values)
        if not curves:
            return None
        highest = max(y for curve in curves for _, y in curve.points)
        title = f"Loss on {PAIRS} fixed pairs of timestep and noise; 1: the frozen base with the target prompt"
        return plot(curves, "training step", "relative loss", title, y_range=(0.0, max(1.0, highest)))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything that a resumed fit needs, for a checkpoint."""
        state = {} if self.frozen is None else {f"{PREFIX}frozen": self.frozen}
        for stage, values in self.values.items():
            state[f"{PREFIX}{stage}/steps"] = torch.tensor(list(values), dtype=torch.int64)
            state[f"{PREFIX}{stage}/values"] = torch.tensor(list(values.values()), dtype=torch.float32)  # they were computed in fp32
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], done: Mapping[str, int], device: torch.device) -> bool:
        """Loads a state that :meth:`state_dict` returned.

        Args:
            state: tensors by name; those of other objects are ignored.
            done: number of finished steps of each stage of the checkpoint.
            device: device of the run.

        Returns:
            Whether the state is valid; nothing is loaded otherwise.
        """
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        frozen = own.pop("frozen", None)
        loaded: dict[str, dict[int, float]] = {}
        for stage in (stage for stage in done if f"{stage}/steps" in own or f"{stage}/values" in own):
            steps, values = own.pop(f"{stage}/steps", torch.empty(0)), own.pop(f"{stage}/values", torch.empty(0))
            if not _is_series(steps, values, done[stage]):
                return False
            loaded[stage] = dict(zip(steps.tolist(), values.tolist(), strict=True))
        if own or (frozen is None and loaded) or (frozen is not None and (frozen.shape != (PAIRS,) or not bool((frozen > 0).all()))):
            return False
        self.values, self.frozen = loaded, None if frozen is None else frozen.float().to(device)
        return True


def _is_series(steps: Tensor, values: Tensor, done: int) -> bool:
    """Returns whether the tensors are ascending steps, up to the finished ones, and a value for each."""
    if steps.dim() != 1 or steps.shape != values.shape or not len(steps) or steps.is_floating_point() or not values.is_floating_point():
        return False
    numbers: Sequence[int] = steps.tolist()
    return numbers == sorted(set(numbers)) and numbers[0] >= 1 and numbers[-1] <= done
