"""ReNoise: fixed-point DDIM inversion (arXiv 2403.14602)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import Tensor

from ...bases.base import Base
from ...sampling.trajectory import Path, Step, Trajectory, guided, predictions
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .inverted import Inverted, InvertingMethod, null_of, source_or_null


class ReNoiseConfig(SamplingConfig):
    """Settings of ReNoise, with the defaults of the official examples for Stable Diffusion and SDXL."""

    iterations: int = Field(default=1, ge=0, le=50)
    """Number of fixed-point iterations after each step of the inversion. 0: DDIM inversion. More reproduce the photo better."""
    average_from: int | None = Field(default=None, ge=0, le=50)
    """Number of the first iteration whose latents are averaged; 0 is the step itself. Without it the last iteration counts alone."""
    negative_source: bool = True
    """Whether guidance uses the source prompt in place of the empty prompt, as in negative-prompt inversion and in the official code."""


class ReNoise(InvertingMethod[ReNoiseConfig]):
    """ReNoise (arXiv 2403.14602): DDIM inversion whose steps are solved for the latents that DDIM leads back from.

    DDIM inversion predicts at the latents before the step. The exact inverse predicts at those after it, which are unknown: they are the
    fixed point ``z' = (z - b f(z', t')) / a``, where ``a z' + b f`` is the step forwards. The iteration stops early at a level where its
    changes grow. The regularisation of the paper, which the official examples for these models do not use, is left out, as is the guidance
    scale of 1 that the official code edits with on few-step models.
    """

    name, config_class = "renoise", ReNoiseConfig
    requires = frozenset({"source_prompt"})

    def invert(self, encoded: EncodedRequest, config: ReNoiseConfig) -> Inverted:
        trajectory, source = Trajectory(encoded.base, config.steps), source_or_null(encoded)
        path: Path = {config.steps: encoded.clean}
        for step in trajectory.backwards(encoded.clean, guided(encoded.base, source)):

            def predict(latents: Tensor, timestep: float = step.timestep) -> Tensor:
                return predictions(encoded.base, latents, timestep, source)[0]

            iterates = [step.latents, *fixed_point(trajectory, step, predict, config.iterations)]
            counted = iterates[-1:] if config.average_from is None else iterates[config.average_from :] or iterates[-1:]
            path[step.end] = step.latents = torch.stack(counted).mean(0) if len(counted) > 1 else counted[0]
        null = source if config.negative_source else null_of(encoded)
        return Inverted(encoded.base, trajectory, path, [source] * config.steps, [null] * config.steps)

    def check_config(self, base: Base, config: ReNoiseConfig) -> None:
        Trajectory(base, config.steps).coefficients(0)

    def passes_with(self, base: Base, config: ReNoiseConfig) -> Passes:
        inversion, sampling = config.steps * (1 + config.iterations), config.steps * guided_passes(config.guidance_scale)
        return Passes(inversion + sampling, at_most=config.iterations > 1)


def fixed_point(trajectory: Trajectory, step: Step, predict: Callable[[Tensor], Tensor], count: int) -> Iterator[Tensor]:
    """Solves a step backwards for the latents ``z'`` from which the step forwards leads to ``step.before``.

    Args:
        trajectory: the noise levels.
        step: the step backwards; its ``latents`` are the first guess.
        predict: returns the prediction of the denoiser for latents at ``step.end``.
        count: largest number of iterations.

    Yields:
        The latents after each iteration. It ends before an iteration that changes them more than the one before did.
    """
    a, b = trajectory.coefficients(step.index)
    latents, change = step.latents, float("inf")
    for _ in range(count):
        following = (step.before - b * predict(latents)) / a
        change_now = float((following - latents).norm())
        if change_now > change:
            return
        yield following
        latents, change = following, change_now
