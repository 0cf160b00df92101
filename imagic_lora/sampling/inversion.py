"""DDIM whose steps take their noise from a photo: edit-friendly inversion (arXiv 2304.06140)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Tracing(DDIMScheduler):
    """Goes along a given path, whatever is predicted, and writes down what each step has to add to the mean of the next latents.

    Attributes:
        path: latents to be at before each step and after the last, ``[steps + 1, B, C, h, w]``.
        added: what the steps so far had to add, each ``[B, C, h, w]``: in the words of the paper the noise of a step times its deviation.
    """

    path: Tensor
    added: list[Tensor]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  # what the pipelines ask of a sampler that adds noise
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.added.append(self.path[len(self.added) + 1] - self.mean(model_output, timestep, sample, eta))
        return (self.path[len(self.added)],)

    def mean(self, model_output: Tensor, timestep: int, sample: Tensor, eta: float) -> Tensor:
        """Of the next latents, before noise is added."""
        return super().step(model_output, timestep, sample, eta, variance_noise=torch.zeros_like(sample), return_dict=False)[0]


class Retracing(Tracing):
    """Adds at each step what was written down: if the same is predicted, the path leads to the photo again; if not, to an edit of it.

    Attributes:
        added: what is still to be added, the next first.
    """

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (self.mean(model_output, timestep, sample, eta) + self.added.pop(0),)
