"""The training stage, and the training loop of both stages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EmbedConfig, TuneConfig
from ..core.errors import ImagicError, NotFinite
from ..core.noise import key, noise_at, times_at
from ..core.runtime import Processes, Runtime, to_device
from ..core.tensors import all_finite
from .objective import denoising_loss
from .resuming.checkpoints import START_OVER
from .updating.updates import build_updates

TRAINABLE, OPTIMIZER = "trainables/", "optimizer/"


@dataclass(frozen=True)
class StepReport:
    """Report of one finished step.

    Args:
        stage: name of the stage, ``embed`` or ``tune``.
        step: number of finished steps, from 1.
        steps: total number of steps of the stage.
        loss: mean over the global batch, a scalar tensor on the device; reading its value synchronises with the device. None where
            nothing is trained: while class pictures are made, which is reported as stage ``class``.
        relative_loss: loss on the fixed pairs of timestep and noise as a ratio to that of the frozen base; None where it is not evaluated.
        early_stop: whether the stage ends with this step because the relative loss no longer falls.
        preview: path of the sheet of previews that was written after this step; None where none was.
    """

    stage: str
    step: int
    steps: int
    loss: Tensor | None
    relative_loss: float | None = None
    early_stop: bool = False
    preview: Path | None = None


@dataclass(eq=False)
class Batch:
    """A call of the denoiser that a stage needs. The stage of a fit that shares its calls with others yields it and waits for ``losses``.

    Args:
        base: the base.
        latents: latents of the photo, ``[1, C, h, w]``, or of every sample.
        conditioning: of one image, or of every sample.
        noise: standard normal noise, ``[B, C, h, w]``.
        times: times in [0, 1), ``[B]``.
        scale: what the mean loss is multiplied by for the backward pass; None for losses without gradients.
        losses: the loss of each sample, ``[B]`` fp32, once the denoiser was called.
    """

    base: Base
    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    times: Tensor
    scale: float | None = None
    losses: Tensor | None = None

    def run(self) -> Tensor:
        """Calls the denoiser for this batch alone and returns its losses."""
        return denoising_loss(self.base, self.latents, self.conditioning, self.noise, self.times)


class Stage:
    """Trainables, objective and optimizer of one training stage. The stages differ only in what is trained.

    Args:
        name: name of the stage; the noise depends on it.
        base: the base; trainable layers may be attached to its denoiser.
        latents: latents of the photos, ``[N, C, h, w]``; the samples take them in turn.
        conditioning: returns the conditioning of a step; it may depend on the trainables.
        trainables: by name: fp32 parameters, or bf16 parameters, which are updated with stochastic rounding.
        config: steps, learning rate, batch size per process and timestep sampling of the stage.
        seed: seed of noise and timesteps.
        processes: the processes that share the batch.
        perturbed: returns the conditioning of a training step, ``[B, ...]`` or ``[1, ...]``, from that of the stage, the index of the step
            and the indices of the samples.

    Attributes:
        shared: whether :func:`train` yields the batches of this stage instead of running them.
    """

    shared = False

    def __init__(
        self,
        name: str,
        base: Base,
        latents: Tensor,
        conditioning: Callable[[], Conditioning],
        trainables: Mapping[str, Parameter],
        config: EmbedConfig | TuneConfig,
        seed: int,
        processes: Processes,
        perturbed: Callable[[Conditioning, int, range], Conditioning] = lambda conditioning, k, samples: conditioning,
    ) -> None:
        self.name, self.base, self.latents, self.conditioning = name, base, latents, conditioning
        self.trainables, self.config, self.seed, self.processes = dict(trainables), config, seed, processes
        self.updates = build_updates(self.trainables, config.learning_rate, base.runtime, key(seed, name), optimizer_of(name, base.runtime))
        self.perturbed = perturbed
        self._finite = torch.ones((), dtype=torch.bool, device=latents.device)

    def step(self, k: int) -> StepReport:
        """Runs one training step.

        Noise and timesteps depend only on the seed, the stage, ``k`` and the sample index, not on earlier steps.

        Args:
            k: index of the step, from 0.
        """
        loss = self.loss(self.batch(k).run())
        self.updates.backward(loss * self.updates.scale, k, self.processes)
        return self._report(loss.detach(), k)

    def shared_step(self, k: int) -> Generator[Batch, None, StepReport]:
        """As :meth:`step`, but yields the batch: whoever takes it sets its losses, and runs the backward pass of their mean."""
        batch = self.batch(k)
        yield batch
        assert batch.losses is not None, "whoever takes a batch runs it"
        self.updates.apply(k, self.processes)
        return self._report(batch.losses.mean(), k)

    def batch(self, k: int) -> Batch:
        """The batch of a training step."""
        samples, total = self.processes.samples(self.config.batch_size), self.config.batch_size * self.processes.count
        noise, times = self.drawn(self.name, k)
        latents = cycled(self.latents, k, samples, total)
        return Batch(self.base, latents, self.conditioning_at(k, samples), noise, times, self.updates.scale)

    def loss(self, losses: Tensor) -> Tensor:
        """The loss of a step from the losses of its samples."""
        return losses.mean()

    def conditioning_at(self, k: int, samples: range) -> Conditioning:
        """The conditioning of a training step, of one image or of every sample."""
        return self.perturbed(self.conditioning(), k, samples)

    def drawn(self, name: str, k: int) -> tuple[Tensor, Tensor]:
        """Noise ``[B, C, h, w]`` and times ``[B]`` of a training step; they depend on a name."""
        samples, total = self.processes.samples(self.config.batch_size), self.config.batch_size * self.processes.count
        noise = to_device(noise_at(self.seed, name, k, samples, tuple(self.latents.shape[1:])), self.latents.device)
        return noise, times_at(self.seed, name, k, samples, total, self.config.timesteps)

    def _report(self, loss: Tensor, k: int) -> StepReport:
        """The report of a step; it remembers whether all losses and gradients were finite."""
        self.processes.average([loss])
        self._finite = self._finite & loss.isfinite() & self.updates.finite
        return StepReport(self.name, k + 1, self.config.steps, loss)

    def check(self) -> None:
        """Checks that all losses and gradients so far and the current trainables are finite; synchronises with the device.

        Raises:
            NotFinite: a loss, a gradient or a trainable is NaN or infinite.
        """
        if not self._finite or not all_finite(parameter.detach() for parameter in self.trainables.values()):
            raise NotFinite(
                f"a loss, gradient or weight of stage {self.name} is not a finite number",
                "finite numbers",
                f"try --dtype fp32 or bf16, or a lower --{self.name}.learning-rate (now {self.config.learning_rate:g})",
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Returns trainables and optimizer states without copying: all that resuming needs except the step number."""
        named = {f"{TRAINABLE}{name}": parameter.detach() for name, parameter in self.trainables.items()}
        return named | {f"{OPTIMIZER}{name}": value for name, value in self.updates.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state that :meth:`state_dict` returned.

        Raises:
            ImagicError: the names or shapes of trainables or optimizer states do not match this stage.
        """
        shapes = {f"{TRAINABLE}{name}": parameter.shape for name, parameter in self.trainables.items()}
        if shapes != {name: value.shape for name, value in state.items() if name.startswith(TRAINABLE)}:
            got = f"the saved trainables have other names or shapes than those of stage {self.name}"
            raise ImagicError(got, "a checkpoint of the same base and settings", START_OVER)
        with torch.no_grad():
            for name, parameter in self.trainables.items():
                parameter.copy_(state[TRAINABLE + name])
        states = {name.removeprefix(OPTIMIZER): value for name, value in state.items() if name.startswith(OPTIMIZER)}
        self.updates.load_state_dict(states)


def cycled(latents: Tensor, k: int, samples: range, total: int) -> Tensor:
    """Returns the latents of the samples of a step, which take the given ones in turn, step after step; one alone is returned as it is.

    Args:
        latents: ``[N, C, h, w]``.
        k: index of the step.
        samples: indices of the samples within the global batch.
        total: size of the global batch.
    """
    return latents if len(latents) == 1 else latents[[(k * total + sample) % len(latents) for sample in samples]]


def optimizer_of(stage: str, runtime: Runtime) -> str:
    """Name of the optimizer of a stage: Adam for stage 1 where stage 2 has Adafactor, whose savings are nothing to an embedding."""
    return "adam" if stage == "embed" and runtime.optimizer == "adafactor" else runtime.optimizer


Progress = StepReport | Batch
"""What a running stage yields: reports, and the batches of a stage that shares them."""


def train(stage: Stage, start: int = 0, stop: Callable[[], bool] = lambda: False) -> Generator[Progress, None, None]:
    """Runs a stage to its end; close the generator to stop early.

    Finiteness is checked after every step on the CPU, after every tenth on CUDA, and after the last step.

    Args:
        stage: the stage to run.
        start: number of steps that are already finished.
        stop: called after every step; if it returns True in one process, all processes stop after the same step.

    Yields:
        A report after every step; before it, where the stage is shared, its batch.

    Raises:
        NotFinite: a loss, a gradient or a trainable is NaN or infinite.
    """
    check_interval = 10 if stage.latents.device.type == "cuda" else 1
    for k in range(start, stage.config.steps):
        report = (yield from stage.shared_step(k)) if stage.shared else stage.step(k)
        if report.step % check_interval == 0 or report.step == report.steps:
            stage.check()
        yield report
        if stage.processes.any(stop()):
            return
