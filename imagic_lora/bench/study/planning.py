"""What each rater of a study sees: which questions, in which order, on which sides, and the question that comes twice."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ImagicError
from .results import Item

LEAST = 3
"""Fewest questions of a rater: two, and one of them again."""


@dataclass(frozen=True)
class Question:
    """A choice between the edits of one photo by two methods.

    Args:
        item: the photo, its prompt and its edits.
        methods: the method that the study is about, and one that it is compared with.
    """

    item: Item
    methods: tuple[str, str]


@dataclass(frozen=True)
class Trial:
    """A question as a rater sees it.

    Args:
        question: index of the question.
        swapped: whether the first of its methods is on the right.
    """

    question: int
    swapped: bool


def check_methods(items: Sequence[Item], methods: Sequence[str]) -> None:
    """Checks the names of the methods of a study.

    Args:
        items: from :func:`~imagic_lora.bench.study.results.read_results`.
        methods: the names that were given.

    Raises:
        ImagicError: there are fewer than two, one is given twice, or no item has an edit by it.
    """
    known = list(dict.fromkeys(method for item in items for method in item.edits))
    if len(methods) < 2 or len(set(methods)) < len(methods):
        raise ImagicError(f"--methods {','.join(methods)}", "two or more different methods", f"choose among {', '.join(known)}")
    for method in methods:
        if method not in known:
            raise ImagicError(f"--methods {method}", f"one of {', '.join(known)}", "correct --methods, or run the method first")


def files_of(items: Sequence[Item], methods: Sequence[str]) -> list[Path]:
    """Returns the image files that a study may show: photos, and edits by its methods."""
    edited = [item for item in items if sum(method in item.edits for method in methods) > 1]
    return [path for item in edited for path in (item.photo, *(item.edits[method] for method in methods if method in item.edits))]


def questions_of(items: Sequence[Item], methods: Sequence[str], images: Mapping[Path, str]) -> tuple[list[Question], list[str]]:
    """Returns the questions of a study, and in words what is left out: items without both edits, and pairs of equal images.

    Args:
        items, methods: as :func:`check_methods` accepts them; the first method is compared with each of the others.
        images: the image of each of :func:`files_of` as the page shows it.

    Raises:
        ImagicError: there is no question about a pair.
    """
    found: list[Question] = []
    left_out = []
    for other in methods[1:]:
        pair = (methods[0], other)
        complete = [item for item in items if all(method in item.edits for method in pair)]
        different = [item for item in complete if images[item.edits[pair[0]]] != images[item.edits[other]]]
        if missing := len(items) - len(complete):
            left_out.append(f"{_count(missing)} without edits by both {pair[0]} and {other}")
        if equal := len(complete) - len(different):
            left_out.append(f"{_count(equal)} where {pair[0]} and {other} made the same image")
        if not different:
            got = f"no photo has two different edits by {pair[0]} and {other}"
            raise ImagicError(got, "at least one photo that both methods edited", "choose other --methods, or other results")
        found += [Question(item, pair) for item in different]
    return found, left_out


def _count(number: int) -> str:
    return f"{number} photo{'' if number == 1 else 's'}"


def plan_sheets(questions: int, raters: int, shown: int, seed: int) -> list[list[Trial]]:
    """Returns what each rater sees.

    Every question is asked about equally often. A rater sees each question once, except one that returns with swapped sides, not before
    the last third. On half of a rater's questions, drawn at random, the first method is on the right.

    Args:
        questions: number of questions of the study, at least 1.
        raters: number of raters.
        shown: number of questions that a rater answers, the repeated one included; at least :data:`LEAST`. Fewer if the study has fewer.
        seed: of all choices.
    """
    rng = random.Random(f"imagic-lora/study/{seed}")
    count = min(shown - 1, questions)
    deck: list[int] = []
    sheets = []
    for _ in range(raters):
        hand: list[int] = []
        while len(hand) < count:
            if not any(question not in hand for question in deck):
                deck += rng.sample(range(questions), questions)
            hand.append(deck.pop(_first(deck, hand)))
        rng.shuffle(hand)
        first = rng.randrange(2)  # of an odd number of questions, one side has one more
        sides = rng.sample([(k + first) % 2 == 0 for k in range(count)], count)
        trials = [Trial(question, swapped) for question, swapped in zip(hand, sides, strict=True)]
        again = trials[rng.randrange((count + 2) // 3)]
        trials.insert(rng.randint(count - count // 3, count), Trial(again.question, not again.swapped))
        sheets.append(trials)
    return sheets


def _first(deck: Sequence[int], hand: Iterable[int]) -> int:
    """The position of the first question of a deck that is not in a hand."""
    return next(k for k, question in enumerate(deck) if question not in hand)
