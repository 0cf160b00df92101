"""What a picture of the world shows: five attributes a caption can name, and an identity it cannot."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

Animal = Literal["cat", "dog", "rabbit", "bird"]
Pose = Literal["sitting", "standing", "jumping", "sleeping"]
Colour = Literal["white", "gray", "black", "brown", "orange", "blue"]
Place = Literal["grass", "sand", "snow", "night"]
Thing = Literal["none", "hat", "ball"]
Split = Literal["train", "heldout", "demo"]

ANIMALS: tuple[str, ...] = get_args(Animal)
POSES: tuple[str, ...] = get_args(Pose)
COLOURS: tuple[str, ...] = get_args(Colour)
PLACES: tuple[str, ...] = get_args(Place)
THINGS: tuple[str, ...] = get_args(Thing)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "animal": ANIMALS,
    "pose": POSES,
    "colour": COLOURS,
    "place": PLACES,
    "thing": THINGS,
}
"""The attributes a caption can name, each with its values in a fixed order (the judge's class indices)."""

RANGES: dict[str, tuple[float, float]] = {
    "shade": (-1, 1),
    "size": (0.92, 1.12),
    "x": (29, 35),
    "y": (55, 60),
    "spots": (0, 3),
    "sun": (0, 1),
    "horizon": (34, 44),
    "tint": (-1, 1),
}
"""What a caption cannot say but for the facing: the range over which each factor is drawn evenly, the spots in whole numbers."""
IDENTITY: dict[str, float] = {name: (high - low) / math.sqrt(12) for name, (low, high) in RANGES.items()} | {"spots": math.sqrt(1.25)}
"""The same factors in the same order, each with its standard deviation over scenes."""

WHERE = {"grass": "on the grass", "sand": "on the sand", "snow": "in the snow", "night": "at night"}
WITH = {"none": "", "hat": "wearing a hat", "ball": "with a ball"}


@dataclass(frozen=True)
class Scene:
    """One picture of the world, in full.

    The first five fields are what a caption can say. The others are the identity, which an edit must keep:

    Args:
        shade: lightness within the colour, -1 (darker) to 1 (lighter).
        size: scale of the animal, 0.92 to 1.12.
        x, y: where the animal's feet are, in pixels of a 64x64 picture, y down.
        facing: 1 looks right, -1 looks left.
        spots: number of spots on the body, 0 to 3.
        sun: position of the sun or moon across the sky, 0 (left) to 1 (right).
        horizon: height of the horizon in pixels from the top.
        tint: warmth of the light, -1 (cold) to 1 (warm).
    """

    animal: Animal
    pose: Pose
    colour: Colour
    place: Place
    thing: Thing
    shade: float
    size: float
    x: float
    y: float
    facing: Literal[-1, 1]
    spots: int
    sun: float
    horizon: float
    tint: float

    def edited(self, **changes: str) -> Scene:
        """The scene of the true edit: the named attributes changed, the identity kept.

        Raises:
            ValueError: a name is not one of the five attributes, or a value is not one of its values.
        """
        for name, value in changes.items():
            if name not in ATTRIBUTES:
                raise ValueError(f"an edit changes one of {', '.join(ATTRIBUTES)}, not {name!r}")
            if value not in ATTRIBUTES[name]:
                raise ValueError(f"{name} is one of {', '.join(ATTRIBUTES[name])}, not {value!r}")
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]  # the values were checked above


def scene_at(split: Split, index: int) -> Scene:
    """Scene number ``index`` of a split: the same on every machine, and no two splits share a seed.

    ``train`` trains the embedded base, ``heldout`` measures it, ``demo`` is for the demo and the example adapters. The benchmark draws its
    scenes from seeds of its own.
    """
    return random_scene(random.Random(f"critters/{split}/{index}"))


def random_scene(rng: random.Random) -> Scene:
    """A scene with every attribute and factor drawn evenly over its range."""
    return Scene(
        animal=rng.choice(ANIMALS),  # pyright: ignore[reportArgumentType]
        pose=rng.choice(POSES),  # pyright: ignore[reportArgumentType]
        colour=rng.choice(COLOURS),  # pyright: ignore[reportArgumentType]
        place=rng.choice(PLACES),  # pyright: ignore[reportArgumentType]
        thing=rng.choice(THINGS),  # pyright: ignore[reportArgumentType]
        shade=rng.uniform(*RANGES["shade"]),
        size=rng.uniform(*RANGES["size"]),
        x=rng.uniform(*RANGES["x"]),
        y=rng.uniform(*RANGES["y"]),
        facing=rng.choice((-1, 1)),
        spots=rng.randrange(4),
        sun=rng.random(),
        horizon=rng.uniform(*RANGES["horizon"]),
        tint=rng.uniform(*RANGES["tint"]),
    )


def caption(scene: Scene) -> str:
    """The full caption: ``a brown dog sitting on the grass wearing a hat``."""
    words = [article(scene.colour), scene.colour, scene.animal, scene.pose, WHERE[scene.place], WITH[scene.thing]]
    return " ".join(w for w in words if w)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as a person might write it: phrases left out at random, the pose before or after the animal.

    Half of the captions are complete; the others keep each of colour, pose, place and thing with probability one half, so that
    short prompts work too.
    """
    keep = dict.fromkeys(("colour", "pose", "place", "thing"), True)
    if rng.random() < 0.5:
        keep = {name: rng.random() < 0.5 for name in keep}
    colour = [scene.colour] if keep["colour"] else []
    pose = [scene.pose] if keep["pose"] else []
    before = rng.random() < 0.3
    words = [*(pose if before else []), *colour, scene.animal, *([] if before else pose)]
    opening = "a photo of " if rng.random() < 0.2 else ""
    tail = [WHERE[scene.place]] if keep["place"] else []
    tail += [WITH[scene.thing]] if keep["thing"] and scene.thing != "none" else []
    return " ".join([f"{opening}{article(words[0])}", *words, *tail])
