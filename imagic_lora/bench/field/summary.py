"""The summary of scored pictures: means with 95% bootstrap intervals over photos, for all pictures and for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...methods.method import Cost
from ..evaluator.evaluator import Settings
from ..evaluator.measures import Measure
from ..evaluator.sources import PIXELS
from ..intervals import RESAMPLES, bootstrapped
from .scoring import Scored, rows_of

VERSION = 1
INTERVAL = f"95%, percentile bootstrap over photos, {RESAMPLES:,} resamples"


def summarise(
    about: Mapping[str, Any], settings: Settings, weights: Mapping[str, str], scored: Sequence[Scored], costs: Mapping[str, Sequence[Cost]]
) -> dict[str, Any]:
    """Returns the summary as JSON values.

    ``rows.ROW.measures.NAME`` has the keys ``mean``, ``low``, ``high`` and ``count``, as has ``rows.ROW.groups.CLASS.NAME``. A photo that
    several cases share is drawn with all of them, also where it lies in several files. Pictures that failed are counted and in no mean.

    Args:
        about: what was run.
        settings: the metrics, and how pictures are treated.
        weights: what tells the weights of each model from others.
        scored: what came of each picture, in the order of the table.
        costs: the cost of each edit by row; empty for pictures that were made elsewhere.
    """
    named = settings.measures()
    rows = {}
    for row in rows_of([one.picture for one in scored]):
        own = [one for one in scored if one.picture.row == row]
        groups = sorted({one.picture.case.group for one in own if one.picture.case.group is not None})
        rows[row] = {
            "pictures": len(own),
            "failed": sum(one.error is not None for one in own),
            "measures": _means(named, own),
            "groups": {group: _means(named, [one for one in own if one.picture.case.group == group]) for group in groups},
            "cost": _cost(costs.get(row, ())),
        }
    errors = [{"case": one.picture.case.name, "row": one.picture.row, "error": one.error} for one in scored if one.error is not None]
    evaluator = {"size": settings.size, "as_published": settings.as_published, "measures": _described(named, settings, weights)}
    photos = len({one.photo for one in scored if one.photo})
    counts = {"pictures": len(scored), "photos": photos, "failed": len(errors)}
    return {"version": VERSION, **about, **counts, "interval": INTERVAL, "evaluator": evaluator, "rows": rows, "errors": errors}


def _means(named: Sequence[Measure], scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """The measures that pictures have, with their intervals."""
    found = {}
    for measure in named:
        have = [one for one in scored if measure.name in one.values]
        mean = bootstrapped([one.values[measure.name] for one in have], [one.photo for one in have])
        if mean is not None:
            found[measure.name] = vars(mean) | {"count": len(have)}
    return found


def _described(named: Sequence[Measure], settings: Settings, weights: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each measure is: its model, its weights, its preprocessing."""
    found = {}
    for measure in named:
        model = None if measure.metric == PIXELS else settings.sources.of(measure.metric) or measure.metric
        about = {"title": measure.title, "region": measure.region, "better": measure.better, "preprocessing": measure.preprocessing}
        found[measure.name] = {**about, "model": model, "weights": weights.get(measure.metric)}
    return found


def _cost(costs: Sequence[Cost]) -> dict[str, float]:
    if not costs:
        return {}
    passes = {name: float(np.mean([getattr(cost, name) for cost in costs])) for name in ("forward", "backward")}
    return {**passes, "seconds": float(np.median([cost.seconds for cost in costs]))}
