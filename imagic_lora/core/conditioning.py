"""The encoded prompt that conditions the denoiser, and the interpolation by eta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

VECTORS = "vectors."
"""Prefix of the names of token vectors in a file."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The encoded prompts of a batch. Two objects are equal only if they are the same object.

    Args:
        tokens: ``[B, T, D]``, the text encoder's state of every token; some families have several states of a token, ``[B, T, L, D]``.
        pooled: ``[B, P]``, the pooled embedding, or None for families without one.
        extra: other inputs of the denoiser by name, such as sizes; stored with the rest, never optimised or interpolated.
        mask: ``[B, T]`` bool, True for the tokens of words, False for padding; None where nothing depends on it.
        vectors: by text encoder, the vectors of the prompt's tokens that it encoded, ``[1, T, D]``; empty unless a fit optimises them. They
            are stored with the rest and are no input of the denoiser, so a conditioning for a batch has none.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """A copy on ``device``; ``dtype`` applies to the tokens and the pooled embedding, not to the extra inputs."""
        return Conditioning(
            self.tokens.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
            {name: value.to(device) for name, value in self.extra.items()},
            None if self.mask is None else self.mask.to(device),
            {name: value.to(device) for name, value in self.vectors.items()},
        )

    def expand(self, batch: int) -> Conditioning:
        """Broadcasts a conditioning of batch size 1 to ``batch``; one of batch size ``batch`` is returned unchanged."""
        return Conditioning(
            self.tokens.expand(batch, *self.tokens.shape[1:]),
            None if self.pooled is None else self.pooled.expand(batch, -1),
            {name: value.expand(batch, *value.shape[1:]) for name, value in self.extra.items()},
            None if self.mask is None else self.mask.expand(batch, -1),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file: ``tokens``, every extra input, ``pooled`` and ``mask`` (1 and 0) unless they are None, and the
        vectors as ``vectors.ENCODER``."""
        named = {"tokens": self.tokens, **self.extra, **{f"{VECTORS}{name}": value for name, value in self.vectors.items()}}
        named |= {} if self.pooled is None else {"pooled": self.pooled}
        return named if self.mask is None else {**named, "mask": self.mask.float()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Conditioning:
        """The inverse of :meth:`tensors`."""
        vectors = {name.removeprefix(VECTORS): value for name, value in named.items() if name.startswith(VECTORS)}
        extra = {name: value for name, value in named.items() if name not in ("tokens", "pooled", "mask") and not name.startswith(VECTORS)}
        mask = named.get("mask")
        return cls(named["tokens"], named.get("pooled"), extra, None if mask is None else mask != 0, vectors)


def interpolate(target: Conditioning, optimised: Conditioning, eta: float) -> Conditioning:
    """``e_eta = eta * e_tgt + (1 - eta) * e_opt``: equation 3 of Imagic (arXiv 2210.09276).

    Args:
        target: conditioning of the target prompt, ``e_tgt``; the result has its extra inputs and its mask.
        optimised: conditioning optimised on the photo, ``e_opt``, of the same shapes.
        eta: 0 returns the tensors of ``optimised``, 1 those of ``target``, both exactly.
    """

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return a.clone() if eta == 1 else eta * a + (1 - eta) * b

    pooled = None
    if target.pooled is not None and optimised.pooled is not None:
        pooled = mix(target.pooled, optimised.pooled)
    return Conditioning(mix(target.tokens, optimised.tokens), pooled, target.extra, target.mask)


def difference(optimised: Conditioning, target: Conditioning) -> dict[str, Tensor]:
    """What was added to a target embedding: ``tokens`` ``[1, n, ...]`` of the trained tokens, and ``pooled`` if there is one.

    Args:
        optimised: the optimised embedding; its tokens outside of the mask are those of the target.
        target: the target embedding; the trained tokens are those of its mask, all without one.
    """
    tokens = optimised.tokens - target.tokens
    found = {"tokens": tokens if target.mask is None else tokens[:, target.mask[0]]}
    if optimised.pooled is not None and target.pooled is not None:
        found["pooled"] = optimised.pooled - target.pooled
    return found


def changed(target: Conditioning, added: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of :func:`difference`: the target embedding with what was added. Gradients flow to ``added``."""
    if target.mask is None:
        tokens = target.tokens + added["tokens"]
    else:
        tokens = target.tokens.index_add(1, target.mask[0].nonzero().flatten(), added["tokens"])
    pooled = None if target.pooled is None else target.pooled + added["pooled"]
    return Conditioning(tokens, pooled, target.extra, target.mask)


def concatenate(conditionings: list[Conditioning]) -> Conditioning:
    """Concatenates conditionings of equal shapes along the batch dimension, in order."""
    first = conditionings[0]
    pooled = None if first.pooled is None else torch.cat([c.pooled for c in conditionings if c.pooled is not None])
    extra = {name: torch.cat([c.extra[name] for c in conditionings]) for name in first.extra}
    mask = None if first.mask is None else torch.cat([c.mask for c in conditionings if c.mask is not None])
    return Conditioning(torch.cat([c.tokens for c in conditionings]), pooled, extra, mask)
