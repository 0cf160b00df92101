"""RF-Inversion (arXiv 2410.10792)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ...bases.base import Base
from ...sampling.flow_trajectory import FlowTrajectory
from ...sampling.trajectory import Step, last
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .walking import FlowMethod, guided_velocity


class RFInversionConfig(SamplingConfig):
    """Settings of RF-Inversion; the defaults are those of the example for FLUX.1 in diffusers' community pipelines."""

    steps: int = Field(default=28, ge=1, le=1000)
    """Number of steps of each way."""
    guidance_scale: float = Field(default=3.5, ge=1, le=50)
    """Scale of classifier-free guidance on the way down."""
    gamma: float = Field(default=0.5, ge=0, le=1)
    """Pull to a random noise on the way up: 0 is Euler's method backwards, 1 leads to that noise."""
    pull: float = Field(default=0.9, ge=0, le=1)
    """Pull to the photo on the way down: 0 is Euler's method, 1 leads to the photo."""
    stop: float = Field(default=0.25, ge=0, le=1)
    """Share of the steps on the way down, from noise, that are pulled to the photo."""


class RFInversion(FlowMethod[RFInversionConfig]):
    """RF-Inversion (arXiv 2410.10792): up to noise with the empty prompt, pulled to a random noise, and down, at first pulled to the photo.

    The prediction of a step is at its noisier end in both directions, as everywhere here; the paper's is at its start.
    """

    name, config_class = "rf-inversion", RFInversionConfig

    def edited(self, encoded: EncodedRequest, config: RFInversionConfig, trajectory: FlowTrajectory) -> Tensor:
        assert encoded.null is not None
        clean, noise, sigmas = encoded.clean, encoded.noise(), trajectory.sigmas
        up = guided_velocity(encoded, encoded.null, 1)
        down = guided_velocity(encoded, encoded.target, config.guidance_scale)

        def to_noise(latents: Tensor, step: Step) -> Tensor:
            return torch.lerp(up(latents, step), (noise - latents) / (1 - sigmas[step.start]), config.gamma)

        def to_photo(latents: Tensor, step: Step) -> Tensor:
            share = config.pull if step.index < int(config.steps * config.stop) else 0.0
            return torch.lerp(down(latents, step), (latents - clean) / sigmas[step.start], share)

        noised = last(clean, trajectory.backwards(clean, to_noise))
        return last(noised, trajectory.forwards(noised, to_photo))

    def passes_with(self, base: Base, config: RFInversionConfig) -> Passes:
        return Passes(config.steps * (1 + guided_passes(config.guidance_scale)))
