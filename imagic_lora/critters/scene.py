"""What a picture of the world shows: five attributes that a full caption names, and an identity that it leaves out."""

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
"""What a full caption names, each with its values in a fixed order (the judge's class indices)."""

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
"""What a full caption leaves out but for the facing: the range over which each factor is drawn evenly, the spots in whole numbers."""
IDENTITY: dict[str, float] = {name: (high - low) / math.sqrt(12) for name, (low, high) in RANGES.items()} | {"spots": math.sqrt(1.25)}
"""The same factors in the same order, each with its standard deviation over scenes."""

WHERE = {"grass": "on the grass", "sand": "on the sand", "snow": "in the snow", "night": "at night"}
WITH = {"none": "", "hat": "wearing a hat", "ball": "with a ball"}
WORDS: dict[str, tuple[str, ...]] = {
    "shade": ("deep", "dark", "light", "pale"),
    "size": ("tiny", "small", "large", "huge"),
    "x": ("leftmost", "leftward", "rightward", "rightmost"),
    "y": ("distant", "far", "near", "close"),
    "spots": ("without spots", "with one spot", "with two spots", "with three spots"),
    "sun": ("early", "earlier", "later", "late"),
    "horizon": ("high horizon", "higher horizon", "lower horizon", "low horizon"),
    "tint": ("cold", "cool", "warm", "hot"),
}
"""What a caption of the training may say of each factor of the identity: a word for each quarter of its range."""


@dataclass(frozen=True)
class Scene:
    """One picture of the world, in full.

    The first five fields are what a full caption says. The others are the identity, which an edit must keep:

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


def displaced(scene: Scene, name: str) -> Scene:
    """The scene with one factor of the identity moved by half of its range, around its end, or facing the other way."""
    if name == "facing":
        return replace(scene, facing=-scene.facing)  # pyright: ignore[reportArgumentType]
    if name == "spots":
        return replace(scene, spots=(scene.spots + 2) % 4)
    low, high = RANGES[name]
    return replace(scene, **{name: low + (getattr(scene, name) - low + (high - low) / 2) % (high - low)})


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
    return describe(scene, {*ATTRIBUTES})


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as a person might write it: phrases left out at random, the pose before or after the animal, some words on the identity,
    as in ``a small pale brown dog sitting with two spots facing left near on the grass in the warm hours``.

    Half of the captions tell all attributes; the others keep each of colour, pose, place and thing with probability one half, so that
    short prompts work too. Of the identity three in ten say nothing, as many or a few more all of it, and the others each of its factors
    and the facing with probability one half.
    """
    tell = {"colour", "pose", "place", "thing"}
    if rng.random() < 0.5:
        tell = {name for name in sorted(tell) if rng.random() < 0.5}
    share = rng.choices((0.0, 0.5, 1.0), (0.3, 0.35, 0.35))[0]
    tell |= {name for name in (*WORDS, "facing") if rng.random() < share}
    return ("a photo of " if rng.random() < 0.2 else "") + describe(scene, tell, before=rng.random() < 0.3)


def longest_caption(scene: Scene) -> str:
    """All that a caption of the training can say: attributes, and a word or two on everything of the identity."""
    return describe(scene, {*ATTRIBUTES, *WORDS, "facing"})


def describe(scene: Scene, tell: set[str], before: bool = False) -> str:
    """A caption that tells the animal and what else it is to tell; ``before``: the pose comes before the animal."""
    said = {name: _level(scene, name) for name in WORDS} | {"colour": scene.colour, "pose": scene.pose}
    said |= {"facing": "facing " + ("right" if scene.facing > 0 else "left"), "place": WHERE[scene.place], "thing": WITH[scene.thing]}
    order = ["pose", "size", "shade", "colour"] if before else ["size", "shade", "colour"]
    words = [*(said[name] for name in order if name in tell), scene.animal, *([scene.pose] if "pose" in tell and not before else [])]
    words += [said[name] for name in ("spots", "facing", "y", "x", "place", "thing") if name in tell and said[name]]
    hours = [said[name] for name in ("tint", "sun") if name in tell]
    words += ["in the", *hours, "hours"] if hours else []
    words += [said["horizon"]] if "horizon" in tell else []
    return f"{article(words[0])} {' '.join(words)}"


def _level(scene: Scene, name: str) -> str:
    """The word for the quarter of a factor's range; for spots, of their number."""
    if name == "spots":
        return WORDS[name][scene.spots]
    low, high = RANGES[name]
    return WORDS[name][min(int((getattr(scene, name) - low) / (high - low) * 4), 3)]
