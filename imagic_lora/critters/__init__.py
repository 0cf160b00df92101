"""The procedural world of the embedded base: images of cartoon animals whose true edit is known.

May import: no other room. Must not know: models, methods, commands.

A :class:`Scene` holds all parameters of an image. :func:`render` draws it, :func:`caption` describes it, and
``scene.edited(pose="jumping")`` is the scene of the true edit.

- ``scene.py``: scenes, their attributes and identity, random scenes, captions
- ``draw.py``: rendering a scene to an image of 64x64 pixels
- ``judge.py``: the network that reads the scene of an image; used only for scores
- ``data/``: the weights of the embedded base, of the judge and of the CLIP model for scores
- ``dit/``: the weights of the embedded flow transformer, ``critters-dit``; its VAE and text encoder are those of ``data/``
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
