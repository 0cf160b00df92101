"""What the denoiser is told: the encoded text, and its interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The encoded text of one prompt, or of a batch of them; equal to itself alone.

    Args:
        tokens: ``[B, T, D]``, one state a token.
        pooled: ``[B, P]`` or None, for families with a pooled embedding.
        extra: other inputs by name (sizes, for instance); carried and stored, never optimised or interpolated.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """A copy on another device; ``dtype`` changes the tokens and the pooled embedding, not the extra inputs."""
        return Conditioning(
            self.tokens.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
            {name: value.to(device) for name, value in self.extra.items()},
        )

    def expand(self, batch: int) -> Conditioning:
        """The conditioning for a batch: a single one is broadcast, a batch of the right size is kept."""
        return Conditioning(
            self.tokens.expand(batch, -1, -1),
            None if self.pooled is None else self.pooled.expand(batch, -1),
            {name: value.expand(batch, *value.shape[1:]) for name, value in self.extra.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file: ``tokens``, ``pooled`` where there is one, and every extra input."""
        named = {"tokens": self.tokens, **self.extra}
        return named if self.pooled is None else {**named, "pooled": self.pooled}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Conditioning:
        """The inverse of :meth:`tensors`."""
        extra = {name: value for name, value in named.items() if name not in ("tokens", "pooled")}
        return cls(named["tokens"], named.get("pooled"), extra)


def source_conditionings(target: Conditioning, optimised: Conditioning, etas: Sequence[float], source_eta: float) -> list[Conditioning]:
    """What the photo is inverted under, for edits at these etas: the interpolation at ``source_eta``, or at the eta of the edit where
    that is less. Equal ones are one object."""
    found = {at: interpolate(target, optimised, at) for at in {min(eta, source_eta) for eta in etas}}
    return [found[min(eta, source_eta)] for eta in etas]


def interpolate(target: Conditioning, optimised: Conditioning, eta: float) -> Conditioning:
    """``e_eta = eta * e_tgt + (1 - eta) * e_opt``: equation 3 of Imagic (arXiv 2210.09276).

    Args:
        target: of the target text; its extra inputs are kept.
        optimised: of the photo, the same shapes.
        eta: 0 reconstructs the photo, 1 is the target text; 0 and 1 are exact.
    """

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return a.clone() if eta == 1 else eta * a + (1 - eta) * b

    pooled = None
    if target.pooled is not None and optimised.pooled is not None:
        pooled = mix(target.pooled, optimised.pooled)
    return Conditioning(mix(target.tokens, optimised.tokens), pooled, target.extra)


def concatenate(several: list[Conditioning]) -> Conditioning:
    """Conditionings of one batch, in order."""
    first = several[0]
    pooled = None if first.pooled is None else torch.cat([c.pooled for c in several if c.pooled is not None])
    extra = {name: torch.cat([c.extra[name] for c in several]) for name in first.extra}
    return Conditioning(torch.cat([c.tokens for c in several]), pooled, extra)
