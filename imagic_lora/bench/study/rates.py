"""Preference rates of a study with 95% intervals, and which raters are careless."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...core.errors import ImagicError
from .key import Answers, Choice, Key, method_of

RESAMPLES = 4000
RULE = "a rater is careless who chooses another edit when one question comes again with swapped sides"
_Z = 1.959963984540054  # the 97.5% quantile of the normal distribution


class Interval(NamedTuple):
    """A 95% interval of a rate."""

    low: float
    high: float


class Vote(NamedTuple):
    """An answer to a question about a pair of methods.

    Args:
        rater: number of the rater.
        item: name of the photo.
        preferred: whether the method that the study is about was chosen.
    """

    rater: int
    item: str
    preferred: bool


@dataclass(frozen=True)
class Rate:
    """How often a method is preferred to another.

    Args:
        answers: number of answers.
        preferred: in how many of them the method was chosen.
        wilson: the interval as if all answers were independent.
        bootstrap: the interval from resampled raters and photos; None with fewer than two of either.
    """

    answers: int
    preferred: int
    wilson: Interval
    bootstrap: Interval | None

    @property
    def rate(self) -> float:
        """The share of answers that prefer the method."""
        return self.preferred / self.answers


@dataclass(frozen=True)
class Report:
    """The result of a study.

    Args:
        key: its key.
        raters: numbers of the raters whose answers were read.
        careless: those among them who are careless, see :data:`RULE`.
        kept: whether their answers count.
        rates: the rates by the method that is compared with; None for one that nobody was asked about.
        left: the share of counted answers that chose the left edit, the repeated questions included.
        items: for each method that is compared with, number of answers and preferences by photo.
    """

    key: Key
    raters: Sequence[int]
    careless: Sequence[int]
    kept: bool
    rates: Mapping[str, Rate | None]
    left: float
    items: Mapping[str, Mapping[str, tuple[int, int]]]

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        method, *_ = self.key.methods
        comparisons = {
            other: None
            if rate is None
            else {
                "answers": rate.answers,
                "preferred": rate.preferred,
                "rate": rate.rate,
                "wilson": list(rate.wilson),
                "bootstrap": None if rate.bootstrap is None else list(rate.bootstrap),
                "items": {item: {"answers": count, "preferred": wins} for item, (count, wins) in self.items[other].items()},
            }
            for other, rate in self.rates.items()
        }
        raters = {"read": list(self.raters), "careless": list(self.careless), "careless_count": self.kept, "rule": RULE}
        return {"version": 1, "study": self.key.study, "method": method, "raters": raters, "left": self.left, "comparisons": comparisons}


def report(key: Key, answers: Mapping[int, Answers], keep_careless: bool = False) -> Report:
    """Evaluates the answers of a study. The second answer to the repeated question tells who is careless, and counts in no rate.

    Args:
        key: the key of the study.
        answers: checked answers by the number of the rater.
        keep_careless: whether the answers of careless raters count.

    Raises:
        ImagicError: nobody's answers count.
    """
    careless = [rater for rater, one in answers.items() if is_careless(one)]
    counted = {rater: one for rater, one in answers.items() if keep_careless or rater not in careless}
    if not counted:
        got = f"all of {len(answers)} raters are careless" if answers else "no answers"
        raise ImagicError(got, f"answers of at least one rater who is not: {RULE}", "collect more answers, or use --keep-careless")
    votes: dict[str, list[Vote]] = {other: [] for other in key.methods[1:]}
    for rater, one in counted.items():
        for choice in _once(one.answers):
            question = key.questions[choice.question]
            other = next(method for method in question.edits if method != key.methods[0])
            votes[other].append(Vote(rater, question.item, method_of(question)[choice.chosen] == key.methods[0]))
    sides = [choice.chosen == choice.left for one in counted.values() for choice in one.answers]
    rates = {other: rate_of(found) if found else None for other, found in votes.items()}
    items = {other: _by_item(found) for other, found in votes.items()}
    return Report(key, list(answers), careless, keep_careless, rates, sum(sides) / len(sides), items)


def is_careless(answers: Answers) -> bool:
    """Whether the two answers to the repeated question differ, see :data:`RULE`."""
    chosen: dict[str, str] = {}
    return any(chosen.setdefault(one.question, one.chosen) != one.chosen for one in answers.answers)


def _once(answers: Sequence[Choice]) -> list[Choice]:
    """The first answer to every question."""
    first: dict[str, Choice] = {}
    for one in answers:
        first.setdefault(one.question, one)
    return list(first.values())


def _by_item(votes: Sequence[Vote]) -> dict[str, tuple[int, int]]:
    items = sorted({vote.item for vote in votes})
    chosen = {item: [vote.preferred for vote in votes if vote.item == item] for item in items}
    return {item: (len(values), sum(values)) for item, values in chosen.items()}


def rate_of(votes: Sequence[Vote]) -> Rate:
    """Returns the rate of at least one vote, with both intervals."""
    preferred = sum(vote.preferred for vote in votes)
    return Rate(len(votes), preferred, wilson(preferred, len(votes)), clustered(votes))


def wilson(successes: int, trials: int) -> Interval:
    """Returns the score interval of a binomial rate (Wilson 1927), which is inside [0, 1] also for rates near its ends.

    It solves ``|p - successes / trials| = z sqrt(p (1 - p) / trials)`` for p.

    Args:
        successes: 0 to ``trials``.
        trials: at least 1.
    """
    share, weight = successes / trials, _Z**2 / trials
    centre = share + weight / 2
    half = _Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    low, high = (max(0.0, min(1.0, (centre + sign * half) / (1 + weight))) for sign in (-1, 1))
    return Interval(low if successes else 0.0, high if successes < trials else 1.0)


def clustered(votes: Sequence[Vote]) -> Interval | None:
    """Returns the percentile interval of the rate from resampled raters and resampled photos (pigeonhole bootstrap, Owen 2007).

    A resample draws as many raters and as many photos as there are, with replacement and independently; an answer counts as often as its
    rater times its photo was drawn. Answers of one rater, and about one photo, are alike: the interval is wider than one of independent
    answers.

    Args:
        votes: the answers.

    Returns:
        The interval from :data:`RESAMPLES` resamples with a fixed seed; None with fewer than two raters or two photos.
    """
    raters, items = sorted({vote.rater for vote in votes}), sorted({vote.item for vote in votes})
    if min(len(raters), len(items)) < 2:
        return None
    preferred, answered = np.zeros((2, len(raters), len(items)))
    for vote in votes:
        place = raters.index(vote.rater), items.index(vote.item)
        answered[place] += 1
        preferred[place] += vote.preferred
    rng = np.random.default_rng(0)
    by_rater = rng.multinomial(len(raters), np.full(len(raters), 1 / len(raters)), RESAMPLES).astype(float)
    by_item = rng.multinomial(len(items), np.full(len(items), 1 / len(items)), RESAMPLES).astype(float)
    counts = ((by_rater @ answered) * by_item).sum(1)
    wins = ((by_rater @ preferred) * by_item).sum(1)
    drawn = counts > 0  # a resample may hold no answer where few raters saw few photos
    low, high = np.quantile(wins[drawn] / counts[drawn], [0.025, 0.975])
    return Interval(float(low), float(high))
