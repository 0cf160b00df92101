"""The contract of a training stage, and the one loop that drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EmbedConfig, TuneConfig
from ..core.errors import ImagicError, NotFinite
from ..core.noise import key, noise_at, times_at
from ..core.runtime import Processes, to_device
from ..core.tensors import all_finite
from .objective import denoising_loss
from .optimizers import build_updates

TRAINABLE, OPTIMIZER = "trainables/", "optimizer/"


@dataclass(frozen=True)
class StepReport:
    """One step done.

    Args:
        stage: ``embed`` or ``tune``.
        step: steps done, from 1.
        steps: of the whole stage.
        loss: mean over the global batch, a scalar on the device; reading it waits for the device.
    """

    stage: str
    step: int
    steps: int
    loss: Tensor


class Stage:
    """Trainables, the objective, an optimiser. The stages differ only in what is trained.

    Args:
        name: enters the key of the noise.
        base: its denoiser may carry trainable layers.
        latents: of the photo, ``[1, C, h, w]``.
        conditioning: gives the conditioning of a step; it may depend on the trainables.
        trainables: parameters by name; fp32, or bf16 that is rounded stochastically.
        seed: of noise and timesteps.
        processes: that share the batch.
    """

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
    ) -> None:
        self.name, self.base, self.latents, self.conditioning = name, base, latents, conditioning
        self.trainables, self.config, self.seed, self.processes = dict(trainables), config, seed, processes
        self.updates = build_updates(self.trainables, config.learning_rate, base.runtime, key(seed, name))
        self._finite = torch.ones((), dtype=torch.bool, device=latents.device)

    def step(self, k: int) -> StepReport:
        """Step number ``k`` (from 0): the same whatever came before it, but for the trainables and the optimiser's states."""
        samples, batch = self.processes.samples(self.config.batch_size), self.config.batch_size * self.processes.count
        noise = to_device(noise_at(self.seed, self.name, k, samples, tuple(self.latents.shape[1:])), self.latents.device)
        times = times_at(self.seed, self.name, k, samples, batch, self.config.timesteps)
        loss = denoising_loss(self.base, self.latents, self.conditioning(), noise, times).mean()
        self.updates.backward(loss * self.updates.scale, k, self.processes)
        loss = loss.detach()
        self.processes.average([loss])
        self._finite = self._finite & loss.isfinite() & self.updates.finite
        return StepReport(self.name, k + 1, self.config.steps, loss)

    def check(self) -> None:
        """Reads the finiteness of all steps so far, and of the trainables as they are; waits for the device.

        Raises:
            NotFinite: a loss, a gradient or a trainable was NaN or infinite.
        """
        if not self._finite or not all_finite(parameter.detach() for parameter in self.trainables.values()):
            raise NotFinite(
                f"a loss, gradient or weight of stage {self.name} is not a finite number",
                "finite arithmetic",
                f"try --dtype fp32 or bf16, or a lower --{self.name}.learning-rate (now {self.config.learning_rate:g})",
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The live trainables and optimiser states: all that a resumed run needs besides its step number."""
        named = {f"{TRAINABLE}{name}": parameter.detach() for name, parameter in self.trainables.items()}
        return named | {f"{OPTIMIZER}{name}": value for name, value in self.updates.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ImagicError: names or shapes of the trainables are not those of this stage.
        """
        shapes = {f"{TRAINABLE}{name}": parameter.shape for name, parameter in self.trainables.items()}
        if shapes != {name: value.shape for name, value in state.items() if name.startswith(TRAINABLE)}:
            raise ImagicError(f"a state that does not fit stage {self.name}", "the same base and settings", "begin anew")
        with torch.no_grad():
            for name, parameter in self.trainables.items():
                parameter.copy_(state[TRAINABLE + name])
        states = {name.removeprefix(OPTIMIZER): value for name, value in state.items() if name.startswith(OPTIMIZER)}
        self.updates.load_state_dict(states)


def train(stage: Stage, start: int = 0, stop: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
    """Runs a stage from step ``start`` to its end, yielding after every step; closing the iterator stops it.

    Finiteness is read every step on the CPU, every ten on CUDA, and after the last.

    Args:
        stop: asked after every step; one process that is to stop stops all, after the same step.

    Raises:
        NotFinite: something was not finite.
    """
    every = 10 if stage.latents.device.type == "cuda" else 1
    for k in range(start, stage.config.steps):
        report = stage.step(k)
        if report.step % every == 0 or report.step == report.steps:
            stage.check()
        yield report
        if stage.processes.any(stop()):
            return
