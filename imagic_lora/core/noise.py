"""Noise and timesteps as pure functions of their key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import Timesteps

_GOLDEN = 0.6180339887498949


def key(*parts: int | str) -> int:
    """A 63-bit seed that depends on all the parts and on nothing else."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise_at(seed: int, stage: str, step: int, samples: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise ``[len(samples), *shape]``, fp32, on the CPU.

    Each sample depends only on ``(seed, stage, step, sample)``, so that a resumed run is the same run, and two processes are one with
    twice the batch.
    """
    generators = (torch.Generator().manual_seed(key(seed, stage, step, sample)) for sample in samples)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def times_at(seed: int, stage: str, step: int, samples: Iterable[int], total: int, kind: Timesteps) -> Tensor:
    """Times ``u`` in [0, 1), ``[len(samples)]`` fp64, for samples of a global batch of ``total``.

    ``stratified`` puts one in each of ``total`` equal parts, all at the same place within their part; from step to step that place moves by
    the golden ratio, which also spreads the times of a batch of one evenly over the steps. ``uniform`` draws each independently.
    """
    if kind == "uniform":
        draws = [key(seed, stage, step, sample, "time") / 2**63 for sample in samples]
        return torch.tensor(draws, dtype=torch.float64)
    start = key(seed, stage, "time") / 2**63
    place = (start + step * _GOLDEN) % 1.0
    return torch.tensor([(sample + place) / total for sample in samples], dtype=torch.float64)
