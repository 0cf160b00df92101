"""Inversion of a photo: DDIM inversion (arXiv 2010.02502) and edit-friendly inversion (arXiv 2304.06140)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .pipelines import conditioning_kwargs, pipeline_guidance, sample_latents
from .trajectory import Trajectory, guided, last


class NoiseRecorder(DDIMScheduler):
    """Follows a fixed path of latents and records the noise that each DDIM step has to add to reach the next latents of the path.

    Attributes:
        path: latents before each step and after the last one, ``[steps + 1, B, C, h, w]``.
        added: recorded noise of the steps so far, each ``[B, C, h, w]``: the term ``sigma_t * z_t`` of the paper.
    """

    path: Tensor
    added: list[Tensor]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  # pipelines inspect the signature for eta and generator
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        """Records the noise of this step and returns the next latents of the path, whatever the denoiser predicts."""
        self.added.append(self.path[len(self.added) + 1] - self.mean(model_output, timestep, sample, eta))
        return (self.path[len(self.added)],)

    def mean(self, model_output: Tensor, timestep: int, sample: Tensor, eta: float) -> Tensor:
        """Returns the mean of the next latents: the DDIM step without its noise."""
        return super().step(model_output, timestep, sample, eta, variance_noise=torch.zeros_like(sample), return_dict=False)[0]


class NoiseReplayer(NoiseRecorder):
    """Adds the recorded noise at each step: the same predictions reproduce the photo, other predictions give an edit of it.

    Attributes:
        added: recorded noise of the remaining steps, next step first.
    """

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        """Returns the mean of the next latents plus the recorded noise of this step."""
        return (self.mean(model_output, timestep, sample, eta) + self.added.pop(0),)


def invert(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int = 0) -> tuple[Tensor]:
    """Returns the noise from which DDIM without guidance reproduces the photo: DDIM run backwards (arXiv 2010.02502, section 4.3).

    The arguments are those of :func:`record_noise`; ``seed`` has no effect.

    Returns:
        The latents before the first step, ``[1, C, h, w]``, in a tuple of one; no step adds noise.
    """
    latents = clean.to(base.runtime.device).float()
    return (last(latents, Trajectory(base, config.steps).backwards(latents, guided(base, source))),)


def record_noise(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int) -> tuple[Tensor, ...]:
    """Returns the noise with which stochastic DDIM reproduces the photo: edit-friendly inversion (arXiv 2304.06140, equations 5 and 6).

    The latents of the photo are noised to the noise level of every step, each with independent noise. The recorded noise of a step is
    the difference between the latents of the next level and the mean that DDIM predicts for them.

    Args:
        base: the base with the adapter applied.
        canvas: the photo; it gives the image size.
        clean: latents of the photo, ``[1, C, h, w]``.
        config: settings of the sampling.
        source: the conditioning of the photo.
        seed: seed of the noise; another seed reproduces the same photo and gives another edit.

    Returns:
        The latents before the first step, then the noise that each step adds, all ``[1, C, h, w]``.
    """
    pipe: Any = base.pipeline("text2image", NoiseRecorder)
    recorder = pipe.scheduler
    recorder.set_timesteps(config.steps)
    draws = torch.randn(config.steps, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    noised = recorder.add_noise(clean.expand_as(draws), draws, recorder.timesteps)
    recorder.path, recorder.added = torch.cat([noised, clean]).to(base.runtime.dtype)[:, None], []
    sample_latents(base, pipe, _inversion_kwargs(base, canvas, source, config, recorder.path[0]) | {"eta": config.ddim_eta})
    return recorder.path[0], *recorder.added


def _inversion_kwargs(base: Base, canvas: Canvas, source: Conditioning, config: EditConfig, latents: Tensor) -> dict[str, Any]:
    """Returns the pipeline kwargs for an inversion: given start latents, the conditioning of the photo, and no guidance."""
    height, width = canvas.pixels.shape[2:]
    sampling = {"height": height, "width": width, "latents": latents, "num_inference_steps": config.steps}
    return conditioning_kwargs(base, source, None) | sampling | {"guidance_scale": pipeline_guidance(base, config, guided=False)}
