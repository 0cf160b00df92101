"""Sampling of source and target side by side, the target with the attention of the source."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.conditioning import Conditioning, concatenate
from ...sampling.attention import tapped
from ...sampling.trajectory import Predict, Step, guided
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
    predict = _target_guided(inverted, target, scale) if on_path else _both_guided(inverted, target, scale)
    latents = inverted.path[inverted.start].repeat(2, 1, 1, 1)

    def counted(latents: Tensor, step: Step) -> Tensor:
        control.step = step.index - inverted.start
        return predict(latents, step)

    with tapped(inverted.base, control):
        for step in inverted.trajectory.forwards(latents, counted, inverted.start):
            if inverted.added:
                step.latents = step.latents + inverted.added[step.index]
            if on_path:
                step.latents = torch.cat([inverted.path[step.end], step.latents[1:]])
            if control.blend:
                step.latents = control.blend.blended(step.latents, control.step + 1)
            latents = step.latents
    return latents


def _both_guided(inverted: Inverted, target: Conditioning, scale: float) -> Predict:
    """Returns the prediction with guidance for both: two samples at the null, then source and target at their prompts."""

    def predict(latents: Tensor, step: Step) -> Tensor:
        prompts = concatenate([inverted.sources[step.index], target])
        return guided(inverted.base, prompts, inverted.nulls[step.index], scale)(latents, step)

    return predict


def _target_guided(inverted: Inverted, target: Conditioning, scale: float) -> Predict:
    """Returns the prediction with guidance for the target only: the target at the null, then source and target at their prompts."""

    def predict(latents: Tensor, step: Step) -> Tensor:
        prompts = [inverted.sources[step.index], target]
        if scale == 1:
            return guided(inverted.base, concatenate(prompts))(latents, step)
        samples, conditioning = torch.cat([latents[1:], latents]), concatenate([inverted.nulls[step.index], *prompts])
        without, source, with_prompt = guided(inverted.base, conditioning)(samples, step).split(1)
        return torch.cat([source, without + scale * (with_prompt - without)])

    return predict
