"""The levels of a flow for the loop of :mod:`imagic_lora.sampling.trajectory`: steps of Euler's method along the velocity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bases.base import Base
from ..bases.process import Flow
from ..core.errors import ImagicError
from .trajectory import Levels, Step


class FlowTrajectory(Levels):
    """The levels of Euler's method on a flow (arXiv 2209.03003).

    Args:
        base: a flow. Its levels are used, and its denoiser is not.
        steps: number of steps ``N`` from position 0, sigma 1, to the clean end, sigma 0.
        positions: of the latents, ``h * w``, which the levels of some families depend on.
        ddim_eta: noise of a step forwards, 0 to 1. A step returns the mean of the next latents; the caller adds noise of
            :meth:`standard_deviation`.

    Raises:
        ImagicError: the base is not a flow.
    """

    def __init__(self, base: Base, steps: int, positions: int, ddim_eta: float = 0.0) -> None:
        if not isinstance(base.process, Flow):
            raise ImagicError(f"Euler steps of a flow on {base.name}", "a flow base", "choose another base")
        self.steps, self.ddim_eta, self._process = steps, ddim_eta, base.process
        self.sigmas: list[float] = base.process.sigmas(steps, positions).tolist()
        """Sigma of each position, the clean end included."""
        self.timesteps = self.sigmas[:-1]

    def noised(self, clean: Tensor, noise: Tensor, position: int) -> Tensor:
        """``(1 - s) x_0 + s noise``."""
        return self._process.noised(clean, noise, torch.full((len(noise),), self.sigmas[position], device=noise.device))

    def moved(self, prediction: Tensor, step: Step) -> Tensor:
        """Euler's step along the velocity; forwards with ``ddim_eta`` a share of the noise in the latents is left out."""
        now, after = self.sigmas[step.start], self.sigmas[step.end]
        std = self.standard_deviation(step.index) if step.end > step.start else 0.0
        if not std:
            return step.before + (after - now) * prediction
        clean, noise = step.before - now * prediction, step.before + (1 - now) * prediction
        return (1 - after) * clean + math.sqrt(after**2 - std**2) * noise

    def standard_deviation(self, index: int) -> float:
        """Standard deviation of the noise to add after a step forwards: it replaces the noise that the step left out.

        It is ``ddim_eta`` times that of the ancestral step, ``s' sqrt(1 - ((1 - s) s' / ((1 - s') s))^2)``, which is that of DDIM (arXiv
        2010.02502, equation 16) for signal ``1 - s`` and noise ``s``; 0 for the last step.
        """
        now, after = self.sigmas[index], self.sigmas[index + 1]
        if not self.ddim_eta or not after:
            return 0.0
        return self.ddim_eta * after * math.sqrt(1 - ((1 - now) * after / ((1 - after) * now)) ** 2)
