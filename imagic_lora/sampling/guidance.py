"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from torch import Tensor


def guided(with_prompt: Tensor, without: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Returns ``u + w (c - u)``.

    Args:
        with_prompt: the prediction ``c`` for the prompt, ``[B, C, h, w]``.
        without: the prediction ``u`` for what guidance leads away from, the same shape.
        scale: the guidance scale ``w``.
        rescale: 0 to 1: how far the result is scaled to the standard deviation of ``c`` (arXiv 2305.08891, equations 15 and 16).
    """
    found = without + scale * (with_prompt - without)
    if not rescale:
        return found
    each = tuple(range(1, found.ndim))
    scaled = found * (with_prompt.std(dim=each, keepdim=True) / found.std(dim=each, keepdim=True))
    return rescale * scaled + (1 - rescale) * found
