"""Edit-friendly inversion (arXiv 2304.06140)."""

from __future__ import annotations

from pydantic import Field

from ...bases.base import Base
from ...core.errors import ImagicError
from ...sampling.trajectory import Path, Trajectory, guided
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .inverted import Inverted, InvertingMethod, null_of, source_or_null


class EditFriendlyConfig(SamplingConfig):
    """Settings of edit-friendly inversion, with the defaults of the official code."""

    steps: int = Field(default=100, ge=1, le=1000)
    """Number of sampling steps from noise to the image."""
    guidance_scale: float = Field(default=15.0, ge=1, le=50)
    """Scale of classifier-free guidance with the target prompt."""
    source_guidance_scale: float = Field(default=3.5, ge=1, le=50)
    """Scale of classifier-free guidance with the source prompt, while the noise is recorded."""
    skip: int = Field(default=36, ge=0, le=1000)
    """Number of steps that are left out at the noisy end: a higher value keeps more of the photo. 0: sampling starts from noise."""
    ddim_eta: float = Field(default=1.0, gt=0, le=1)
    """Noise of each step: 1 is that of DDPM."""


class EditFriendly(InvertingMethod[EditFriendlyConfig]):
    """Edit-friendly inversion (arXiv 2304.06140): stochastic sampling with the noise that leads to the photo.

    The photo is noised to the level of every position, each with independent noise. The noise of a step is the difference between the
    latents of the next position and the mean that the source prompt predicts for them. Without a source prompt the empty prompt predicts.
    """

    name, config_class = "edit-friendly", EditFriendlyConfig

    def invert(self, encoded: EncodedRequest, config: EditFriendlyConfig) -> Inverted:
        base, trajectory = encoded.base, Trajectory(encoded.base, config.steps, config.ddim_eta)
        source, null = source_or_null(encoded), null_of(encoded)
        draws = encoded.noise(config.steps)
        path: Path = {p: trajectory.noised(encoded.clean, draws[p : p + 1], p) for p in range(config.skip, config.steps)}
        path[config.steps] = encoded.clean
        added = {}
        for step in trajectory.forwards(path[config.skip], guided(base, source, null, config.source_guidance_scale), config.skip):
            added[step.index] = path[step.end] - step.latents
            step.latents = path[step.end]
        return Inverted(base, trajectory, path, [source] * config.steps, [null] * config.steps, config.skip, added)

    def check_config(self, base: Base, config: EditFriendlyConfig) -> None:
        super().check_config(base, config)
        if config.skip > config.steps:
            raise ImagicError(f"skip {config.skip} with {config.steps} steps", f"0 to {config.steps}", "reduce skip, or use more steps")

    def passes_with(self, base: Base, config: EditFriendlyConfig) -> Passes:
        each_step = guided_passes(config.source_guidance_scale) + guided_passes(config.guidance_scale)
        return Passes((config.steps - config.skip) * each_step)
