"""The noise process of a base: how latents are noised, and what the denoiser learns to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor


class Process(ABC):
    """A noise process. Notation as in :class:`~imagic_lora.bases.base.Base`."""

    prediction_type: str
    """Quantity that the denoiser predicts: ``epsilon`` (the noise), ``v_prediction``, ``sample`` (``x_0``) or ``flow``."""

    @abstractmethod
    def timesteps(self, times: Tensor) -> Tensor:
        """Converts times ``u`` in [0, 1), ``[B]``, to the timesteps ``[B]`` of noise and denoiser; noise grows with ``u``."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Adds noise.

        Args:
            clean: latents ``x_0``, ``[B, C, h, w]``.
            noise: standard normal, the same shape.
            timesteps: ``[B]``, as :meth:`timesteps` returns them.
        """

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training target of the denoiser, ``[B, C, h, w]``, for the arguments of :meth:`noised`."""


class Diffusion(Process):
    """The process of DDPM (arXiv 2006.11239). Timesteps are int64, in [0, ``num_train_timesteps``).

    Args:
        scheduler: DDPMScheduler with the noise schedule of the base's own scheduler. The own scheduler only samples, because other classes
            define ``add_noise`` differently.
        trained_timesteps: timesteps that a distilled base was trained at, ascending, int64 ``[n]``; for LCM more than it samples at. A fit
            trains only at these. None: the base is not distilled, and a fit trains at all timesteps.
    """

    def __init__(self, scheduler: DDPMScheduler, trained_timesteps: Tensor | None = None) -> None:
        self.scheduler: Any = scheduler
        self.trained_timesteps = trained_timesteps
        self.prediction_type = self.scheduler.config.prediction_type

    def timesteps(self, times: Tensor) -> Tensor:
        """``floor(u * num_train_timesteps)``, or ``trained_timesteps[floor(u * n)]`` of the ``n`` timesteps of a distilled base."""
        if self.trained_timesteps is not None:
            return self.trained_timesteps[(times * len(self.trained_timesteps)).long()]
        return (times * self.scheduler.config.num_train_timesteps).long()

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``, equation 4 of DDPM; ``a_t`` is the cumulative product of ``1 - beta``."""
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``epsilon``: the noise. ``v_prediction``: ``sqrt(a_t) noise - sqrt(1 - a_t) x_0`` (arXiv 2202.00512). ``sample``: ``x_0``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, timesteps)
        return clean


class Flow(Process):
    """Rectified flow (arXiv 2209.03003, 2403.03206). Timesteps are the share of noise, sigma in (0, 1], fp32.

    Args:
        shift: ``a`` of ``s = a u / (1 + (a - 1) u)``, which moves the levels towards noise; positive, 1 does nothing.
        trained: number of levels that the base was trained at.
    """

    prediction_type = "flow"

    def __init__(self, shift: float, trained: int = 1000) -> None:
        self.shift, self.trained = shift, trained

    def shifted(self, times: Tensor) -> Tensor:
        """The levels of times in [0, 1], of any shape: equation 23 of arXiv 2403.03206."""
        return self.shift * times / (1 + (self.shift - 1) * times)

    def timesteps(self, times: Tensor) -> Tensor:
        """``s((floor(u n) + 1) / n)`` for ``n`` trained levels: the grid that diffusers' scripts train on."""
        return self.shifted(((times * self.trained).floor() + 1) / self.trained).float()

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_s = (1 - s) x_0 + s noise``."""
        sigma = timesteps.view(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity ``noise - x_0``, from image to noise."""
        return noise - clean

    def sigmas(self, steps: int, positions: int) -> Tensor:
        """The levels of a sampling, descending from 1 to 0, fp32 ``[steps + 1]``.

        As FlowMatchEulerDiscreteScheduler of diffusers has them: evenly spaced from 1 to the lowest trained level, then shifted, then 0.
        The lowest level is shifted already.

        Args:
            steps: number of steps.
            positions: of the latents, ``h * w``. Some families shift the levels of a larger image further towards noise.
        """
        lowest = self.shifted(torch.tensor(1 / self.trained, dtype=torch.float64))
        times = torch.linspace(1.0, lowest.item(), steps, dtype=torch.float64)
        return torch.cat([self.shifted(times), times.new_zeros(1)]).float()
