"""Scenes of the procedural world: five attributes that a full caption names, and an identity that it does not name."""

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
"""The attributes that a full caption names. The order of the values gives the class indices of the judge."""

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
"""The identity, except for the facing: each factor with its range. Factors are drawn uniformly; spots is an integer."""
IDENTITY: dict[str, float] = {name: (high - low) / math.sqrt(12) for name, (low, high) in RANGES.items()} | {"spots": math.sqrt(1.25)}
"""The same factors in the same order, each with its standard deviation over random scenes."""

PLACE_PHRASES = {"grass": "on the grass", "sand": "on the sand", "snow": "in the snow", "night": "at night"}
THING_PHRASES = {"none": "", "hat": "wearing a hat", "ball": "with a ball"}
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
"""The words of training captions for each identity factor: one for each quarter of its range, or for each number of spots."""


@dataclass(frozen=True)
class Scene:
    """All parameters of one image.

    The first five fields are the attributes, which a full caption names. The others are the identity, which an edit must keep.

    Args:
        shade: lightness of the fur within its colour, -1 (darker) to 1 (lighter).
        size: scale of the animal, 0.92 to 1.12.
        x, y: position of the animal's feet in pixels of a 64x64 image, y down; x 29 to 35, y 55 to 60.
        facing: 1 if the animal looks right, -1 if it looks left.
        spots: number of spots on the body, 0 to 3.
        sun: position of the sun or moon across the sky, 0 (left) to 1 (right).
        horizon: position of the horizon in pixels from the top, 34 to 44.
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
        """Returns the scene of the true edit: the given attributes change, the identity stays.

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
    """Returns the scene with one identity factor moved by half of its range, modulo the range; ``facing`` is reversed."""
    if name == "facing":
        return replace(scene, facing=-scene.facing)  # pyright: ignore[reportArgumentType]
    if name == "spots":
        return replace(scene, spots=(scene.spots + 2) % 4)
    low, high = RANGES[name]
    return replace(scene, **{name: low + (getattr(scene, name) - low + (high - low) / 2) % (high - low)})


def scene_at(split: Split, index: int) -> Scene:
    """Returns scene number ``index`` of a split. It is the same on every machine, and splits share no seeds.

    ``train`` is for training the embedded base, ``heldout`` for measuring it, ``demo`` for the demo and the example adapters. The benchmark
    draws its scenes from other seeds.
    """
    return random_scene(random.Random(f"critters/{split}/{index}"))


def random_scene(rng: random.Random) -> Scene:
    """Draws a scene: every attribute and factor uniformly over its values."""
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
    """The full caption, such as ``a brown dog sitting on the grass wearing a hat``."""
    return describe(scene, {*ATTRIBUTES})


def article(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def sample_caption(scene: Scene, rng: random.Random) -> str:
    """Draws a caption for training.

    Example: ``a small pale brown dog sitting with two spots facing left near on the grass in the warm hours``.

    The animal is always named. With probability 0.5 a caption names all attributes; otherwise it names each of colour, pose, place and
    thing with probability 0.5, so that the base also learns short prompts. Of the identity and the facing it names nothing with
    probability 0.3, everything with probability 0.35, and otherwise each factor with probability 0.5. One caption in five starts with
    ``a photo of``, and the pose stands before the animal with probability 0.3.
    """
    names = {"colour", "pose", "place", "thing"}
    if rng.random() < 0.5:
        names = {name for name in sorted(names) if rng.random() < 0.5}
    share = rng.choices((0.0, 0.5, 1.0), (0.3, 0.35, 0.35))[0]
    names |= {name for name in (*WORDS, "facing") if rng.random() < share}
    return ("a photo of " if rng.random() < 0.2 else "") + describe(scene, names, pose_first=rng.random() < 0.3)


def longest_caption(scene: Scene) -> str:
    """The longest caption of the training: it names all attributes and all of the identity."""
    return describe(scene, {*ATTRIBUTES, *WORDS, "facing"})


def describe(scene: Scene, names: set[str], pose_first: bool = False) -> str:
    """Returns a caption that names the animal and the given parameters of a scene.

    Args:
        scene: what the caption describes.
        names: names of the attributes and identity factors in the caption.
        pose_first: whether the pose stands before the animal.
    """
    phrases = {name: _level(scene, name) for name in WORDS} | {"colour": scene.colour, "pose": scene.pose}
    phrases |= {"place": PLACE_PHRASES[scene.place], "thing": THING_PHRASES[scene.thing]}
    phrases |= {"facing": "facing " + ("right" if scene.facing > 0 else "left")}
    order = ["pose", "size", "shade", "colour"] if pose_first else ["size", "shade", "colour"]
    words = [*(phrases[name] for name in order if name in names), scene.animal]
    words += [scene.pose] if "pose" in names and not pose_first else []
    words += [phrases[name] for name in ("spots", "facing", "y", "x", "place", "thing") if name in names and phrases[name]]
    hours = [phrases[name] for name in ("tint", "sun") if name in names]
    words += ["in the", *hours, "hours"] if hours else []
    words += [phrases["horizon"]] if "horizon" in names else []
    return f"{article(words[0])} {' '.join(words)}"


def _level(scene: Scene, name: str) -> str:
    """The word for a factor: by the quarter of its range, or by the number of spots."""
    if name == "spots":
        return WORDS[name][scene.spots]
    low, high = RANGES[name]
    return WORDS[name][min(int((getattr(scene, name) - low) / (high - low) * 4), 3)]
