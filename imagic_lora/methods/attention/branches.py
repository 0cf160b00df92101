"""Sampling of source and target side by side, the target with the attention of the source."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.conditioning import Conditioning, concatenate
from ...sampling.attention import tapped
from ...sampling.trajectory import Step, guided
from ..inversions.inverted import Inverted
from .control import AttentionControl


def two_branches(inverted: Inverted, target: Conditioning, scale: float, control: AttentionControl, on_path: bool = False) -> Tensor:
    """Samples the source and the target from the same latents.

    Args:
        inverted: what is edited: the inversion of a photo, or noise.
        target: conditioning of the target prompt, ``B = 1``.
        scale: guidance scale.
        control: change of the attention of the target. Its local blend comes after each step.
        on_path: whether the source is put back on the path of the inversion after each step, before the local blend. Its guidance has then
            no effect and is left out, which saves a pass.

    Returns:
        Clean latents ``[2, C, h, w]`` of source and target.
    """
    prompts = [concatenate([source, target]) for source in inverted.sources]
    steps = _on_path(inverted, prompts, scale) if on_path else inverted.sample(prompts, scale)
    latents = inverted.path[inverted.start].expand(2, -1, -1, -1)
    with tapped(inverted.base, control):
        for done, step in enumerate(steps, start=1):
            if control.blend:
                step.latents = control.blend.blended(step.latents, done)
            latents, control.step = step.latents, done
    return latents


def _on_path(inverted: Inverted, prompts: list[Conditioning], scale: float) -> Iterator[Step]:
    """Samples the target with guidance, and the source on the path of the inversion.

    The samples of a pass are the target at the null, then source and target at their prompts.

    Args:
        inverted: the inversion of a photo.
        prompts: conditioning of source and target at each step, ``B = 2``.
        scale: guidance scale.

    Yields:
        Each step, of source and target.
    """

    def predict(latents: Tensor, step: Step) -> Tensor:
        if scale == 1:
            return guided(inverted.base, prompts[step.index])(latents, step)
        conditioning = concatenate([inverted.nulls[step.index], prompts[step.index]])
        without, source, target = guided(inverted.base, conditioning)(torch.cat([latents[1:], latents]), step).split(1)
        return torch.cat([source, without + scale * (target - without)])

    latents = inverted.path[inverted.start].expand(2, -1, -1, -1)
    for step in inverted.trajectory.forwards(latents, predict, inverted.start):
        step.latents = torch.cat([inverted.path[step.end], step.latents[1:]])
        yield step
