"""Rules that suggest an eta from the scores of a sweep. Pure functions: no models, no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

GOOD = 0.5
"""Smallest share of the range at which alignment and fidelity count as good."""


COARSE = (0.0, 0.4, 0.6, 0.8, 1.0)
"""The etas that a search begins with."""
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
    def change(self) -> float: ...


S = TypeVar("S", bound=Scored)


@dataclass(frozen=True)
class Curves:
    """The scores of a sweep over eta, each a mean over seeds.

    Args:
        etas: ascending, each once.
        alignment: alignment at each eta, as a share of its range: 0 for the lowest of the sweep, 1 for the highest.
        fidelity: 1 minus the change at each eta as a share of its range: 1 at the smallest change, 0 at the largest.
    """

    etas: tuple[float, ...]
    alignment: tuple[float, ...]
    fidelity: tuple[float, ...]

    @classmethod
    def of(cls, scores: Iterable[Scored]) -> Curves:
        """Averages the scores of images over seeds; a curve without a range is 0 everywhere, and its fidelity 1."""
        by_eta: dict[float, list[Scored]] = {}
        for score in scores:
            by_eta.setdefault(score.eta, []).append(score)
        etas = tuple(sorted(by_eta))
        aligned, changed = (
            _shares([float(np.mean([getattr(score, name) for score in by_eta[eta]])) for eta in etas]) for name in ("alignment", "change")
        )
        return cls(etas, aligned, tuple(1 - share for share in changed))


def _shares(values: list[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    return tuple((value - low) / (high - low) if high > low else 0.0 for value in values)


def product(curves: Curves) -> float:
    """The eta with the largest product of alignment and fidelity."""
    return _best(curves, [a * f for a, f in zip(curves.alignment, curves.fidelity, strict=True)])


def balance(curves: Curves) -> float:
    """The eta at which the smaller one of alignment and fidelity is largest: about where the curves cross."""
    return _best(curves, [min(a, f) for a, f in zip(curves.alignment, curves.fidelity, strict=True)])


def onset(curves: Curves) -> float:
    """The smallest eta whose alignment is good: where the edit has appeared, and the most of the photo is kept."""
    return next((eta for eta, aligned in zip(curves.etas, curves.alignment, strict=True) if aligned >= GOOD), curves.etas[-1])


def jump(curves: Curves) -> float:
    """The eta behind the steepest fall of fidelity: an edit appears suddenly."""
    slopes = np.diff(curves.fidelity) / np.diff(curves.etas)
    return curves.etas[int(slopes.argmin()) + 1] if len(slopes) else curves.etas[0]


def _best(curves: Curves, values: list[float]) -> float:
    return curves.etas[int(np.argmax(values))]


RULES: Mapping[str, Callable[[Curves], float]] = {"product": product, "balance": balance, "onset": onset, "jump": jump}
"""The rules by name. ``scripts/study_eta.py`` compares them."""
RULE = "product"
"""The rule that is used."""


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
