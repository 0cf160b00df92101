"""Negative-prompt inversion (arXiv 2305.16807), and proximal guidance for it (arXiv 2306.05414)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ...bases.base import Base
from ...sampling.trajectory import Step, Trajectory, predictions
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .ddim import pivot
from .inverted import Inverted, InvertingMethod, source_or_null


class NegativePromptInversion(InvertingMethod[SamplingConfig]):
    """Negative-prompt inversion (arXiv 2305.16807): DDIM inversion whose guidance uses the source prompt in place of the empty prompt.

    The prediction is ``s + scale * (t - s)`` for the predictions ``s`` of the source and ``t`` of the target prompt. With equal prompts
    this is ``s`` at every scale, so that the photo comes back as well as without guidance.
    """

    name, config_class = "negative-prompt", SamplingConfig
    requires = frozenset({"source_prompt"})

    def invert(self, encoded: EncodedRequest, config: SamplingConfig) -> Inverted:
        trajectory, source = Trajectory(encoded.base, config.steps), [source_or_null(encoded)] * config.steps
        return Inverted(encoded.base, trajectory, pivot(encoded, trajectory), source, source)

    def passes_with(self, base: Base, config: SamplingConfig) -> Passes:
        return Passes(config.steps * (1 + guided_passes(config.guidance_scale)))


class ProximalConfig(SamplingConfig):
    """Settings of proximal guidance, with the defaults of the official code."""

    threshold: Literal["hard", "soft"] = "hard"
    """What happens to small differences between the predictions. hard: they become 0 (l0). soft: also the others shrink (l1)."""
    quantile: float = Field(default=0.7, ge=0, le=1)
    """Share of the elements of the difference that counts as small."""
    pull: float = Field(default=1.0, ge=0, le=1)
    """How far the latents are moved back to those of the photo after a step, where the difference is small. 0: not at all."""
    pull_below: int = Field(default=400, ge=0, le=1000)
    """Timestep below which the latents are moved back."""
    dilation: int = Field(default=1, ge=0, le=16)
    """Radius in latent pixels by which the area is enlarged that is not moved back."""


class ProximalInversion(InvertingMethod[ProximalConfig]):
    """Negative-prompt inversion with proximal guidance (arXiv 2306.05414): only large differences between source and target prompt guide.

    The difference ``d = t - s`` is thresholded at a quantile of ``|d|`` over all elements. At the low noise levels the latents outside
    the area of large differences are moved back to the path of the inversion.
    """

    name, config_class = "proximal", ProximalConfig
    requires = frozenset({"source_prompt"})

    def invert(self, encoded: EncodedRequest, config: ProximalConfig) -> Inverted:
        return NegativePromptInversion().invert(encoded, config)

    def sample(self, encoded: EncodedRequest, config: ProximalConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        inverted = self.invert(encoded, config)
        kept = torch.zeros_like(encoded.clean)

        def predict(latents: Tensor, step: Step) -> Tensor:
            nonlocal kept
            source, target = predictions(encoded.base, latents, step.timestep, inverted.nulls[step.index], encoded.target)
            difference = target - source
            limit = quantiles(difference.abs(), config.quantile)
            kept = 1 - dilated((difference.abs() > limit).float(), config.dilation)
            return source + config.guidance_scale * thresholded(difference, limit, config.threshold)

        latents = inverted.path[0]
        for step in inverted.trajectory.forwards(latents, predict):
            if step.timestep < config.pull_below:
                step.latents = step.latents + config.pull * kept * (inverted.path[step.end] - step.latents)
            latents = step.latents
        return encoded.image(latents), {}

    def passes_with(self, base: Base, config: ProximalConfig) -> Passes:
        return Passes(3 * config.steps)


def quantiles(values: Tensor, share: float) -> Tensor:
    """Returns a quantile over all elements of each sample, ``[B, 1, 1, 1]``.

    Args:
        values: ``[B, C, h, w]``.
        share: in [0, 1].
    """
    return values.flatten(1).quantile(share, dim=1).view(-1, 1, 1, 1)


def thresholded(values: Tensor, limit: Tensor, threshold: Literal["hard", "soft"]) -> Tensor:
    """Returns the values with those of ``|value| <= limit`` set to 0: the proximal operator of the l0 or the l1 norm.

    Args:
        values: ``[B, C, h, w]``.
        limit: ``[B, 1, 1, 1]``.
        threshold: hard keeps the other values, soft moves them towards 0 by ``limit``.
    """
    if threshold == "hard":
        return values.where(values.abs() > limit, torch.zeros_like(values))
    return values.sign() * (values.abs() - limit).clamp(min=0)


def dilated(mask: Tensor, radius: int) -> Tensor:
    """Returns a mask enlarged by a square of ``2 * radius + 1`` latent pixels.

    Args:
        mask: ``[B, C, h, w]`` of 0 and 1.
        radius: in latent pixels.
    """
    return torch.nn.functional.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius)
