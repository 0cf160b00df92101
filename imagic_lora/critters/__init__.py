"""The procedural world of the embedded base: cartoon animals whose true edit is known.

A :class:`Scene` says everything there is to know of a picture; :func:`render` draws it, :func:`caption` describes it, and
``scene.edited(pose="jumping")`` is the scene whose picture is the true edit. Nothing here imports the rest of the package.
"""

from .draw import SIZE, backdrop, render
from .scene import ANIMALS, ATTRIBUTES, COLOURS, PLACES, POSES, THINGS, Scene, caption, longest_caption, sample_caption, scene_at

__all__ = [
    "ANIMALS",
    "ATTRIBUTES",
    "COLOURS",
    "PLACES",
    "POSES",
    "SIZE",
    "THINGS",
    "Scene",
    "backdrop",
    "caption",
    "longest_caption",
    "render",
    "sample_caption",
    "scene_at",
]
