"""The interpolation of the embeddings of the photo and of the target prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..bases.base import Base
from ..core.conditioning import Conditioning, interpolate
from ..core.config import EditConfig


@torch.no_grad()
def mixed(base: Base, prompt: str, target: Conditioning, optimised: Conditioning, eta: float, padding_eta: float) -> Conditioning:
    """Returns ``e_eta``: ``eta * e_tgt + (1 - eta) * e_opt`` (equation 3 of Imagic, arXiv 2210.09276).

    Where a fit optimised the vectors of the tokens, these are interpolated, and then encoded: those of words at ``eta``, those of the
    padding at ``eta * padding_eta``; start and end token stay. The text encoder then sees the words of the target prompt beside what the
    fit stored in the padding, as if both were one caption.

    Args:
        base: encodes vectors.
        prompt: the target prompt.
        target: conditioning of the target prompt, ``e_tgt``; the result has its extra inputs and its mask.
        optimised: conditioning optimised on the photo, ``e_opt``, of the same shapes.
        eta: 0 returns the tensors of ``optimised``.
        padding_eta: see :attr:`imagic_lora.core.config.EditConfig.padding_eta`.
    """
    if eta == 0 or not optimised.vectors:
        return interpolate(target, optimised, eta)
    vectors = {
        name: torch.lerp(optimised.vectors[name], target.vectors[name], (eta * masks.words + eta * padding_eta * masks.padding)[..., None])
        for name, masks in base.vector_masks(prompt).items()
    }
    return replace(base.encode_vectors(prompt, vectors), extra=target.extra, mask=target.mask, vectors={})


def mixtures(
    base: Base, prompt: str, target: Conditioning, optimised: Conditioning, etas: Sequence[float], config: EditConfig
) -> tuple[list[Conditioning], list[Conditioning]]:
    """Returns the conditionings of edits, and those with which the photo is inverted before each of them.

    An edit is inverted at ``min(eta, config.source_eta)``. Equal values share one object.

    Args:
        base, prompt, target, optimised: as for :func:`mixed`.
        etas: eta of each edit.
        config: settings of the sampling.
    """
    sources = [min(eta, config.source_eta) for eta in etas]
    found = {eta: mixed(base, prompt, target, optimised, eta, config.padding_eta) for eta in {*etas, *sources}}
    return [found[eta] for eta in etas], [found[eta] for eta in sources]
