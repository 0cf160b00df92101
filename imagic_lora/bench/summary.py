"""What the results come to: means with bootstrap intervals, over all cases and over each kind, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..methods.method import Cost
from .cases import KINDS, case_at
from .critters import Bench, Result
from .scores import Score

SHARES = ("success", "attributes", "aligned", "kept")
MEASURES = (*SHARES, "identity", "background", "psnr", "ssim", "clip")
RESAMPLES = 4000
OURS = "imagic-lora"
"""The row that every other is compared with."""


@dataclass(frozen=True)
class Mean:
    """A mean over cases, and its 95% interval by the percentile bootstrap (Efron 1979)."""

    mean: float
    low: float
    high: float


def bootstrapped(values: Sequence[float]) -> Mean | None:
    """The mean of values, drawn again with replacement 4,000 times from a fixed seed; None of no values."""
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high))


@dataclass(frozen=True)
class Row:
    """All cases of one row of the table.

    Args:
        found: score and price by case; None where the method failed.
    """

    found: Mapping[int, tuple[Score, Cost] | None]

    def measure(self, name: str, cases: Iterable[int]) -> list[float]:
        """A measure of those cases: a failure counts as a no in shares, and is left out of all else."""
        values = []
        for case in cases:
            one = self.found[case]
            value = (False if name in SHARES else None) if one is None else getattr(one[0], name)
            values += [] if value is None else [float(value)]
        return values

    def costs(self) -> list[Cost]:
        """What every case that did not fail has cost."""
        return [one[1] for one in self.found.values() if one is not None]


def summarise(bench: Bench, results: Sequence[Result]) -> dict[str, Any]:
    """The whole table as JSON: ``methods.ROW.success.{mean,low,high}``, the same for every measure and, under ``kinds``, for every kind.

    ``methods.ROW.against`` holds, for the cases that both have, how far success and attributes of ``imagic-lora`` are above the row's
    (paired), and how many times its evaluations and its seconds the row takes (mean and median of the pairs).
    """
    rows = _rows(bench, results)
    kinds = {case: case_at(bench.seed, case).kind for case in range(bench.cases)}
    methods = {}
    for name, row in rows.items():
        by_kind = {kind: [case for case in row.found if kinds[case] == kind] for kind in KINDS}
        methods[name] = {
            **_measured(row, row.found),
            "failed": sum(one is None for one in row.found.values()),
            "kinds": {kind: _measured(row, cases) for kind, cases in by_kind.items() if cases},
            "cost": _cost(row.costs()),
            **({"against": _against(rows[OURS], row)} if OURS in rows and name != OURS else {}),
        }
    errors = [{"case": one.case, "method": one.method, "error": one.error} for one in results if one.error]
    return {"seed": bench.seed, "cases": bench.cases, "failed": len(errors), "methods": methods, "errors": errors}


def _rows(bench: Bench, results: Sequence[Result]) -> dict[str, Row]:
    found = {(one.method, one.case): one.rows for one in results}
    return {
        row: Row({case: found[method.name, case].get(row) for case in range(bench.cases) if (method.name, case) in found})
        for method in bench.methods
        for row in method.rows
    }


def _measured(row: Row, cases: Iterable[int]) -> dict[str, Any]:
    cases = list(cases)
    return {name: _interval(row.measure(name, cases)) for name in MEASURES}


def _interval(values: Sequence[float]) -> dict[str, float] | None:
    mean = bootstrapped(values)
    return None if mean is None else vars(mean)


def _cost(costs: Sequence[Cost]) -> dict[str, float]:
    if not costs:
        return {}
    return {
        "forward": float(np.mean([one.forward for one in costs])),
        "backward": float(np.mean([one.backward for one in costs])),
        "evaluations": float(np.mean([one.forward + one.backward for one in costs])),
        "seconds": float(np.median([one.seconds for one in costs])),
        "adapter_bytes": float(np.mean([one.adapter for one in costs])),
    }


def _against(ours: Row, other: Row) -> dict[str, Any]:
    both = [case for case in ours.found if case in other.found]
    ahead = {}
    for measure in ("success", "attributes"):
        pairs = zip(ours.measure(measure, both), other.measure(measure, both), strict=True)
        ahead[measure] = _interval([a - b for a, b in pairs])
    priced = [(a[1], b[1]) for case in both if (a := ours.found[case]) and (b := other.found[case])]
    return {
        **ahead,
        "evaluations": _ratio([(b.forward + b.backward, a.forward + a.backward) for a, b in priced], np.mean),
        "seconds": _ratio([(b.seconds, a.seconds) for a, b in priced], np.median),
    }


def _ratio(pairs: Sequence[tuple[float, float]], middle: Any) -> float | None:
    return float(middle([a / b for a, b in pairs])) if pairs and all(b for _, b in pairs) else None
