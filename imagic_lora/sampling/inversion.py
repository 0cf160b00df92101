"""DDIM whose steps take their noise from a photo: edit-friendly inversion (arXiv 2304.06140)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .pipelines import conditioning_kwargs, pipeline_guidance, pipeline_with_scheduler, sample_latents


class NoiseRecorder(DDIMScheduler):
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


class NoiseReplayer(NoiseRecorder):
    """Adds at each step what was written down: if the same is predicted, the path leads to the photo again; if not, to an edit of it.

    Attributes:
        added: what is still to be added, the next first.
    """

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (self.mean(model_output, timestep, sample, eta) + self.added.pop(0),)


def invert(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int = 0) -> tuple[Tensor]:
    """The noise from which DDIM without guidance returns to the photo: DDIM run backwards (arXiv 2010.02502, section 4.3).

    Arguments as for :func:`record_noise`; the seed changes nothing.

    Returns:
        The latents before the first step, ``[1, C, h, w]``; no step adds noise.
    """
    backwards = pipeline_with_scheduler(base, DDIMInverseScheduler)
    return (sample_latents(base, backwards, _photo_kwargs(base, canvas, source, config, clean.to(base.runtime.dtype))),)


def record_noise(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int) -> tuple[Tensor, ...]:
    """The noise with which DDIM that adds some comes back to the photo: edit-friendly inversion (arXiv 2304.06140, equations 5 and 6).

    The photo is noised to the level of every step, each time anew; what a step has to add to get from one level to the next is kept.

    Args:
        clean: the photo's latents, ``[1, C, h, w]``.
        source: the conditioning that stands for the photo.
        seed: of the noise; other noise leads to the same photo, and to another edit.

    Returns:
        The latents before the first step, then what each step adds, all ``[1, C, h, w]``.
    """
    along = pipeline_with_scheduler(base, NoiseRecorder)
    sampler: Any = along.scheduler
    sampler.set_timesteps(config.steps)
    draws = torch.randn(config.steps, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    noised = sampler.add_noise(clean.expand_as(draws), draws, sampler.timesteps)
    sampler.path, sampler.added = torch.cat([noised, clean]).to(base.runtime.dtype)[:, None], []
    sample_latents(base, along, _photo_kwargs(base, canvas, source, config, sampler.path[0]) | {"eta": config.ddim_eta})
    return sampler.path[0], *sampler.added


def _photo_kwargs(base: Base, canvas: Canvas, source: Conditioning, config: EditConfig, latents: Tensor) -> dict[str, Any]:
    """What a pipeline is told to go from such latents without guidance, at the conditioning that stands for the photo."""
    high, wide = canvas.pixels.shape[2:]
    how = {"height": high, "width": wide, "latents": latents, "num_inference_steps": config.steps}
    return conditioning_kwargs(base, source, None) | how | {"guidance_scale": pipeline_guidance(base, config, guided=False)}
