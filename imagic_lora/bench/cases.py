"""The cases of CritterBench: a photo, the target prompt a user would write, and the true edit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL import Image, ImageChops, ImageFilter

from ..critters import ATTRIBUTES, Scene, render
from ..critters.scene import describe, random_scene

Kind = Literal["pose", "colour", "place", "thing", "animal"]
_BRUSH = 5  # side of the square that a mask grows by, in pixels
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Case:
    """One edit of one photo.

    Args:
        index: number of the case, from 0. It is also the seed of the methods.
        kind: the attribute that changes.
        source: the scene of the photo.
        truth: the scene of the true edit.
        prompt: the target prompt: the animal, and the new value of the attribute.
        source_prompt: the same sentence about the photo: the animal, and the present value of the attribute.
    """

    index: int
    kind: Kind
    source: Scene
    truth: Scene
    prompt: str
    source_prompt: str


def case_at(seed: int, index: int) -> Case:
    """Returns case number ``index`` of a seed; it is the same on every machine.

    Cases with an even index change the pose. The others cycle through the remaining kinds. A thing is only ever added, never removed or
    replaced: a target prompt names what the image shows and cannot exclude anything.

    Args:
        seed: seed of the cases.
        index: number of the case, from 0.
    """
    rng = random.Random(f"critters/bench/{seed}/{index}")
    kind: Kind = "pose" if index % 2 == 0 else KINDS[1 + index // 2 % 4]
    source = random_scene(rng)
    if kind == "thing":
        source = replace(source, thing="none")
    value = rng.choice([value for value in ATTRIBUTES[kind] if value not in (getattr(source, kind), "none")])
    truth = source.edited(**{kind: value})
    pose_first = rng.choice((False, True))
    prompt, source_prompt = (describe(scene, {kind}, pose_first) for scene in (truth, source))
    return Case(index, kind, source, truth, prompt, source_prompt)


def given_mask(case: Case) -> Image.Image:
    """Returns the mask of a case for methods that need one: what the true edit changes, and two pixels around it, as a user would paint it.

    It knows the true edit, which no other method does: the row of such a method says that its mask is given.

    Returns:
        Mode L, of the size of the photo; 255 may change, 0 may not.
    """
    changes = ImageChops.difference(render(case.source), render(case.truth)).split()
    changed = ImageChops.lighter(ImageChops.lighter(changes[0], changes[1]), changes[2])
    return changed.point([0] + [255] * 255).filter(ImageFilter.MaxFilter(_BRUSH))
