"""Means with confidence intervals by the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000


@dataclass(frozen=True)
class Mean:
    """A mean, and its 95% confidence interval by the percentile bootstrap."""

    mean: float
    low: float
    high: float


def bootstrapped(values: Sequence[float], clusters: Sequence[Any] | None = None) -> Mean | None:
    """Returns the mean of values with its interval from 4,000 resamples with a fixed seed; None if there are no values.

    Args:
        values: the values.
        clusters: what each value belongs to, such as its photo: clusters are drawn with all of their values. None draws single values.
    """
    if not values:
        return None
    numbers: dict[Any, int] = {}
    of = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in (range(len(values)) if clusters is None else clusters)])
    array, counts = np.asarray(values, dtype=float), np.bincount(of)
    sums, draws = np.bincount(of, array), _draws(len(counts))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high))


@lru_cache(16)
def _draws(count: int) -> NDArray[np.int64]:
    """The resamples of a number of clusters."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
