"""Means with confidence intervals by the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Mean:
    """A mean, and its 95% confidence interval by the percentile bootstrap."""

    mean: float
    low: float
    high: float


def bootstrapped(values: Sequence[float]) -> Mean | None:
    """Returns the mean of values with its interval from 4,000 resamples with a fixed seed; None if there are no values."""
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high))
