"""Noise and times as pure functions of seed, stage, step and sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import Timesteps

_GOLDEN_RATIO = 0.6180339887498949  # its fractional part


def key(*parts: int | str) -> int:
    """Hashes the parts to a 63-bit seed."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise_at(seed: int, stage: str, step: int, samples: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise ``[len(samples), *shape]``, fp32, on the CPU.

    Each sample depends only on ``(seed, stage, step, sample)``. So a resumed run draws the same noise as an uninterrupted one, and two
    processes draw the same noise as one process with twice the batch size.
    """
    generators = (torch.Generator().manual_seed(key(seed, stage, step, sample)) for sample in samples)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def times_at(seed: int, stage: str, step: int, samples: Iterable[int], total: int, kind: Timesteps) -> Tensor:
    """Times ``u`` in [0, 1), ``[len(samples)]``, fp64.

    ``stratified`` divides [0, 1) into ``total`` equal intervals and places one time in each, at the same offset within its interval. The
    offset moves by the golden ratio from step to step, so the times are evenly spread over the steps even with a batch size of 1.
    ``uniform`` draws each time independently.

    Args:
        samples: indices of the samples within the global batch.
        total: size of the global batch.
        kind: ``stratified`` or ``uniform``.
    """
    if kind == "uniform":
        draws = [key(seed, stage, step, sample, "time") / 2**63 for sample in samples]
        return torch.tensor(draws, dtype=torch.float64)
    start = key(seed, stage, "time") / 2**63
    offset = (start + step * _GOLDEN_RATIO) % 1.0
    return torch.tensor([(sample + offset) / total for sample in samples], dtype=torch.float64)
