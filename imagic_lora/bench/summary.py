"""The summary of a benchmark: means with bootstrap intervals over all cases and over each kind, and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bases.loading.known import known_base
from ..methods.method import Cost
from .cases import KINDS, case_at
from .critters import Bench, Result
from .intervals import bootstrapped
from .scores import IDENTITY_LIMIT, Score

SHARES = ("success", "attributes", "aligned", "kept")
MEASURES = (*SHARES, "identity", "background", "psnr", "ssim", "clip")
IDENTITY_LIMITS = (0.2, 0.25, 0.3, IDENTITY_LIMIT, 0.4, 0.5, 0.6, 0.75, 1.0, 1.5)
"""Limits of the curve of success over the identity, in standard deviations over scenes."""
OURS = "imagic-lora"
"""The row that every other row is compared with."""


@dataclass(frozen=True)
class Row:
    """The results of one row of the table.

    Args:
        results: score and cost by the number of the case; None if the method failed.
    """

    results: Mapping[int, tuple[Score, Cost] | None]

    def measure(self, name: str, cases: Iterable[int]) -> list[float]:
        """Returns the values of a measure for some cases.

        A failed case counts as 0 in the measures of :data:`SHARES` and is left out of the others.

        Args:
            name: one of :data:`MEASURES`.
            cases: numbers of the cases.
        """
        values = []
        for case in cases:
            result = self.results[case]
            value = (False if name in SHARES else None) if result is None else getattr(result[0], name)
            values += [] if value is None else [float(value)]
        return values

    def curve(self) -> list[dict[str, float]]:
        """Returns the success over all cases at each of :data:`IDENTITY_LIMITS`: its mean and interval, and the ``limit``."""
        points = []
        for limit in IDENTITY_LIMITS:
            values = [float(result is not None and result[0].success_within(limit)) for result in self.results.values()]
            points.append({"limit": limit, **(_interval(values) or {})})
        return points

    def costs(self) -> list[Cost]:
        """Returns the cost of every case that did not fail."""
        return [result[1] for result in self.results.values() if result is not None]


def summarise(bench: Bench, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the summary of a run as JSON values.

    ``methods.ROW.MEASURE`` has the keys ``mean``, ``low`` and ``high``, as has ``methods.ROW.kinds.KIND.MEASURE``. ``methods.ROW.curve`` is
    the success at other limits of the identity.

    ``methods.ROW.against`` compares the row with ``imagic-lora`` on the cases that both have: ``success``, ``attributes`` and ``psnr`` are
    the paired differences, positive where ``imagic-lora`` is better. ``evaluations`` and ``seconds`` are the cost of the row as a multiple
    of the cost of ``imagic-lora`` (mean and median over the pairs).

    Args:
        bench: the run.
        results: its results, in any order.
    """
    rows = _rows(bench, results)
    kinds = {case: case_at(bench.seed, case).kind for case in range(bench.cases)}
    methods = {}
    for name, row in rows.items():
        by_kind = {kind: [case for case in row.results if kinds[case] == kind] for kind in KINDS}
        methods[name] = {
            **_measured(row, row.results),
            "curve": row.curve(),
            "failed": sum(result is None for result in row.results.values()),
            "kinds": {kind: _measured(row, cases) for kind, cases in by_kind.items() if cases},
            "cost": _cost(row.costs()),
            **({"against": _against(rows[OURS], row)} if OURS in rows and name != OURS else {}),
        }
    errors = [{"case": result.case, "method": result.method, "error": result.error} for result in results if result.error]
    return {
        "seed": bench.seed,
        "cases": bench.cases,
        "base": known_base(bench.base).name,
        "failed": len(errors),
        "methods": methods,
        "errors": errors,
    }


def _rows(bench: Bench, results: Sequence[Result]) -> dict[str, Row]:
    by_job = {(result.method, result.case): result.rows for result in results}
    return {
        row: Row({case: by_job[method.name, case].get(row) for case in range(bench.cases) if (method.name, case) in by_job})
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
        "forward": float(np.mean([cost.forward for cost in costs])),
        "backward": float(np.mean([cost.backward for cost in costs])),
        "evaluations": float(np.mean([cost.forward + cost.backward for cost in costs])),
        "seconds": float(np.median([cost.seconds for cost in costs])),
        "adapter_bytes": float(np.mean([cost.adapter for cost in costs])),
    }


def _against(ours: Row, other: Row) -> dict[str, Any]:
    both = [case for case in ours.results if case in other.results]
    completed = [(a, b) for case in both if (a := ours.results[case]) and (b := other.results[case])]
    differences = {"psnr": _interval([a[0].psnr - b[0].psnr for a, b in completed])}
    for measure in ("success", "attributes"):
        pairs = zip(ours.measure(measure, both), other.measure(measure, both), strict=True)
        differences[measure] = _interval([a - b for a, b in pairs])
    costs = [(a[1], b[1]) for a, b in completed]
    return {
        **differences,
        "evaluations": _ratio([(b.forward + b.backward, a.forward + a.backward) for a, b in costs], np.mean),
        "seconds": _ratio([(b.seconds, a.seconds) for a, b in costs], np.median),
    }


def _ratio(pairs: Sequence[tuple[float, float]], average: Any) -> float | None:
    return float(average([a / b for a, b in pairs])) if pairs and all(b for _, b in pairs) else None
