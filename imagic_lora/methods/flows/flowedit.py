"""FlowEdit (arXiv 2412.08629)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ...bases.base import Base
from ...sampling.flow import difference
from ...sampling.flow_trajectory import FlowTrajectory
from ...sampling.trajectory import Step, last
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .walking import FlowMethod, guided_velocity


class FlowEditConfig(SamplingConfig):
    """Settings of FlowEdit; the defaults are those of the official code for Stable Diffusion 3."""

    guidance_scale: float = Field(default=13.5, ge=1, le=50)
    """Scale of classifier-free guidance towards the target prompt."""
    source_guidance_scale: float = Field(default=3.5, ge=1, le=50)
    """Scale of classifier-free guidance towards the source prompt."""
    strength: float = Field(default=0.66, gt=0, le=1)
    """Share of the steps, from the clean end, that are taken: 33 of 50. A higher value changes more."""
    average: int = Field(default=1, ge=1, le=16)
    """Number of noises over which the difference of a step is averaged."""
    last_steps: int = Field(default=0, ge=0, le=1000)
    """Number of steps at the clean end that sample the target prompt alone."""


class FlowEdit(FlowMethod[FlowEditConfig]):
    """FlowEdit (arXiv 2412.08629): from the photo along the difference of the velocities for target and source prompt, without inversion.

    At each level photo and edit get the same fresh noise; the edit moves by the difference of the two velocities. With equal prompts and
    scales it stays the photo.
    """

    name, config_class = "flowedit", FlowEditConfig
    requires = frozenset({"source_prompt"})

    def edited(self, encoded: EncodedRequest, config: FlowEditConfig, trajectory: FlowTrajectory) -> Tensor:
        assert encoded.source is not None
        clean, start = encoded.clean, trajectory.position(config.strength)
        turn = max(start, trajectory.steps - config.last_steps)
        noises = iter(encoded.noise(config.average * (turn - start) + 1).unsqueeze(1))
        towards = guided_velocity(encoded, encoded.target, config.guidance_scale)
        away = guided_velocity(encoded, encoded.source, config.source_guidance_scale)

        def predict(latents: Tensor, step: Step) -> Tensor:
            parts = [difference(trajectory, clean, next(noises), towards, away)(latents, step) for _ in range(config.average)]
            return sum(parts[1:], parts[0]) / config.average

        latents = last(clean, trajectory.forwards(clean, predict, start, turn))
        if turn == trajectory.steps:
            return latents
        noised = trajectory.noised(clean, next(noises), turn) + (latents - clean)
        return last(noised, trajectory.forwards(noised, towards, turn))

    def passes_with(self, base: Base, config: FlowEditConfig) -> Passes:
        taken, towards = int(config.steps * config.strength), guided_passes(config.guidance_scale)
        alone = min(taken, config.last_steps)
        return Passes((taken - alone) * config.average * (towards + guided_passes(config.source_guidance_scale)) + alone * towards)

    def check_config(self, base: Base, config: FlowEditConfig) -> None:
        FlowTrajectory(base, config.steps, 1).position(config.strength)
