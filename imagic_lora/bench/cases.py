"""The cases of CritterBench: a picture, the sentence a user would write, and the true edit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..critters import ATTRIBUTES, Scene
from ..critters.scene import describe, random_scene

Kind = Literal["pose", "colour", "place", "thing", "animal"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Case:
    """One edit that is asked for.

    Args:
        index: of the case; also the seed of its starting noise.
        kind: the attribute that changes.
        source: the scene of the photo.
        truth: the scene of the true edit.
        text: what a user would write: the animal, and what should change.
    """

    index: int
    kind: Kind
    source: Scene
    truth: Scene
    text: str


def case_at(seed: int, index: int) -> Case:
    """Case number ``index`` of a seed, the same on every machine: every second one changes the pose, the others take turns.

    A thing is always added, never taken away or swapped: a sentence that names what should be there cannot say what should not.
    """
    rng = random.Random(f"critters/bench/{seed}/{index}")
    kind: Kind = "pose" if index % 2 == 0 else KINDS[1 + index // 2 % 4]
    source = random_scene(rng)
    if kind == "thing":
        source = replace(source, thing="none")
    value = rng.choice([value for value in ATTRIBUTES[kind] if value not in (getattr(source, kind), "none")])
    truth = source.edited(**{kind: value})
    return Case(index, kind, source, truth, describe(truth, {kind}, before=rng.choice((False, True))))
