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
SIZES = ("tiny", "small", "large", "huge")
SHADES = ("deep", "dark", "light", "pale")
SPOTS = ("without spots", "with one spot", "with two spots", "with three spots")


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
    """A caption as a person might write it: phrases left out at random, the pose before or after the animal, now and then a word on the
    identity, as in ``a small pale brown dog sitting with two spots facing left on the grass``.

    Half of the captions tell all attributes; the others keep each of colour, pose, place and thing with probability one half, so that
    short prompts work too. Half say nothing of the identity; the others tell each of shade, size, spots and facing with probability one
    half.
    """
    tell = dict.fromkeys(("colour", "pose", "place", "thing"), True)
    if rng.random() < 0.5:
        tell = {name: rng.random() < 0.5 for name in tell}
    spoken = rng.random() < 0.5
    tell |= {name: spoken and rng.random() < 0.5 for name in ("size", "shade", "spots", "facing")}
    before = rng.random() < 0.3
    opening = "a photo of " if rng.random() < 0.2 else ""
    return opening + _caption(scene, {name for name, told in tell.items() if told}, before)


def longest_caption(scene: Scene) -> str:
    """All that a caption of the training can say: ``a small light brown dog sitting with two spots facing right on the grass``."""
    return _caption(scene, {"size", "shade", "colour", "pose", "spots", "facing", "place", "thing"}, before=False)


def _caption(scene: Scene, tell: set[str], before: bool) -> str:
    """A caption that tells some of the attributes and of the identity; ``before``: the pose comes before the animal."""
    said = {"size": _level(scene, "size", SIZES), "shade": _level(scene, "shade", SHADES), "colour": scene.colour, "pose": scene.pose}
    said |= {"spots": SPOTS[scene.spots], "facing": "facing " + ("right" if scene.facing > 0 else "left")}
    said |= {"animal": scene.animal, "place": WHERE[scene.place], "thing": WITH[scene.thing]}
    order = ["size", "shade", "colour", "animal", "spots", "facing", "place", "thing"]
    order.insert(0 if before else order.index("animal") + 1, "pose")
    words = [said[name] for name in order if (name == "animal" or name in tell) and said[name]]
    return f"{article(words[0])} {' '.join(words)}"


def _level(scene: Scene, name: str, words: tuple[str, ...]) -> str:
    """The word for a factor's part of its range."""
    low, high = RANGES[name]
    return words[min(int((getattr(scene, name) - low) / (high - low) * len(words)), len(words) - 1)]
