"""Rules that suggest an eta from the scores of a sweep. Pure functions: no models, no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

GOOD = 0.5
"""Smallest value at which alignment, as a share of its way, and fidelity count as good."""


COARSE = (0.0, 0.4, 0.6, 0.8, 1.0)
"""The etas that a search begins with."""
PLATEAU = 0.75
"""Share of the highest alignment of a sweep from which on :func:`plateau` counts an edit as done."""
_TIE = 0.95  # values from this share of the highest on count as equal
FINE = 0.1
"""Distance of the etas that it then adds on both sides of the best one."""
SEARCHED = len(COARSE) + 2
"""Number of etas that a search looks at."""


class Scored(Protocol):
    """What a rule needs of the scores of an image."""

    @property
    def eta(self) -> float: ...
    @property
    def alignment(self) -> float: ...
    @property
    def fidelity(self) -> float: ...


S = TypeVar("S", bound=Scored)


@dataclass(frozen=True)
class Curves:
    """The scores of a sweep over eta, each a mean over seeds.

    Args:
        etas: ascending, each once.
        alignment: how far the alignment has come from that of the first eta, 0, to the point where the target prompt explains the image
            as well as the embedding of the photo does, 1. If it begins above that point: to its highest value.
        fidelity: fidelity at each eta, at least 0.
    """

    etas: tuple[float, ...]
    alignment: tuple[float, ...]
    fidelity: tuple[float, ...]

    @classmethod
    def of(cls, scores: Iterable[Scored]) -> Curves:
        """Averages the scores of images over seeds.

        Args:
            scores: the scores of every image; an eta of 0 among them.
        """
        by_eta: dict[float, list[Scored]] = {}
        for score in scores:
            by_eta.setdefault(score.eta, []).append(score)
        etas = tuple(sorted(by_eta))
        aligned = [float(np.mean([score.alignment for score in by_eta[eta]])) for eta in etas]
        kept = [float(np.mean([score.fidelity for score in by_eta[eta]])) for eta in etas]
        start, end = aligned[0], 0.0 if aligned[0] < 0 else max(aligned)
        way = end - start or 1.0
        return cls(etas, tuple(min(max((value - start) / way, 0.0), 1.0) for value in aligned), tuple(max(value, 0.0) for value in kept))


def product(curves: Curves) -> float:
    """The eta with the largest product of alignment and fidelity."""
    return _best(curves, [a * f for a, f in zip(curves.alignment, curves.fidelity, strict=True)])


def balance(curves: Curves) -> float:
    """The eta at which the smaller one of alignment and fidelity is largest: about where the curves cross."""
    return _best(curves, [min(a, f) for a, f in zip(curves.alignment, curves.fidelity, strict=True)])


def onset(curves: Curves) -> float:
    """The smallest eta whose alignment is good: where the edit has appeared, and the most of the photo is kept; the last eta if none is."""
    return next((eta for eta, aligned in zip(curves.etas, curves.alignment, strict=True) if aligned >= GOOD), curves.etas[-1])


def plateau(curves: Curves) -> float:
    """The smallest eta whose alignment is within a quarter of the highest: where more of the prompt no longer adds much to the edit."""
    enough = PLATEAU * max(curves.alignment)
    return next(eta for eta, aligned in zip(curves.etas, curves.alignment, strict=True) if aligned >= enough)


def jump(curves: Curves) -> float:
    """The eta behind the steepest fall of fidelity: an edit appears suddenly."""
    slopes = np.diff(curves.fidelity) / np.diff(curves.etas)
    return curves.etas[int(slopes.argmin()) + 1] if len(slopes) else curves.etas[0]


def _best(curves: Curves, values: list[float]) -> float:
    """The smallest eta whose value is among the highest: between two that hardly differ, the lower one keeps more of the photo.

    Where no value is above 0, because no image shows the edit or none that does keeps anything of the photo, it is that of :func:`onset`.
    """
    if max(values) <= 0:
        return onset(curves)
    return next(eta for eta, value in zip(curves.etas, values, strict=True) if value >= _TIE * max(values))


RULES: Mapping[str, Callable[[Curves], float]] = {"product": product, "balance": balance, "onset": onset, "plateau": plateau, "jump": jump}
"""The rules by name. ``scripts/study.py eta`` compares them."""
RULE = "onset"
"""The rule that is used: none of the others was better on 120 cases of CritterBench (``docs/guide/sweep.md``)."""


def band(curves: Curves) -> tuple[float, float] | None:
    """Returns the etas around the best balance where alignment and fidelity are both good, linearly interpolated; None if there are none.

    The ends are exact to a thousandth of the range of the sweep.
    """
    etas = np.linspace(curves.etas[0], curves.etas[-1], 1001)
    both = np.minimum(np.interp(etas, curves.etas, curves.alignment), np.interp(etas, curves.etas, curves.fidelity))
    first = last = int(both.argmax())
    if both[first] < GOOD:
        return None
    while first > 0 and both[first - 1] >= GOOD:
        first -= 1
    while last < len(etas) - 1 and both[last + 1] >= GOOD:
        last += 1
    return float(etas[first]), float(etas[last])


def search(scores_at: Callable[[Sequence[float]], Iterable[S]], rule: Callable[[Curves], float]) -> Generator[S, None, float]:
    """Searches for the eta of a rule with few images: :data:`COARSE` etas first, then the two beside the best of them.

    Args:
        scores_at: generates and scores images at some etas.
        rule: one of :data:`RULES`.

    Yields:
        The scores of every image.

    Returns:
        The eta.
    """
    scores: list[S] = []
    for score in scores_at(COARSE):
        scores.append(score)
        yield score
    best = rule(Curves.of(scores))
    beside = [round(eta, 6) for eta in (best - FINE, best + FINE) if eta > 0]
    for score in scores_at(beside):
        scores.append(score)
        yield score
    return rule(Curves.of(scores))
