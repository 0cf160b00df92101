"""Previews during stage 2: strips of images at several etas, always with the same seed, in one sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.config import RunConfig
from ...photos.sheet import sheet

ROWS = 12
"""Largest number of strips that are kept, besides the newest one."""
SIDE = 128
"""Longest side of an image of a strip, in pixels."""
PREFIX = "previews/"
"""Start of the names of the tensors of :meth:`Previews.state_dict`."""


def kept_steps(steps: Sequence[int], every: int, most: int = ROWS) -> list[int]:
    """Returns the steps whose strips are kept: every one, or every second, fourth, ... until there are few enough, and the last.

    Args:
        steps: the steps of the strips, ascending.
        every: number of steps between two previews.
        most: largest number of strips besides the last.
    """
    stride = every
    while steps[-1] // stride > most:
        stride *= 2
    return [step for step in steps if step % stride == 0 or step == steps[-1]]


class Previews:
    """The strips of a fit so far.

    Args:
        config: the settings of the run.

    Attributes:
        every: number of steps between two previews; 0 for none.
        etas: eta of each image of a strip.
        strips: images by the number of finished steps of stage 2, ``[etas, height, width, 3]`` uint8.
    """

    def __init__(self, config: RunConfig) -> None:
        self.every = config.previews_every
        self.etas = sorted({0.0, 0.5, config.eta, 1.0}) if config.method == "imagic" else [1.0]
        self.strips: dict[int, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Returns whether a strip belongs to this number of finished steps and is not there yet."""
        return self.every > 0 and step > 0 and step % self.every == 0 and step not in self.strips

    def add(self, step: int, images: Sequence[Image.Image]) -> None:
        """Adds the strip of a step, scaled down, and drops strips if there are too many.

        Args:
            step: number of finished steps of stage 2.
            images: one for each eta, all of one size.
        """
        small = [image.convert("RGB") for image in images]
        for image in small:
            image.thumbnail((SIDE, SIDE))
        self.strips[step] = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
        self.strips = {kept: self.strips[kept] for kept in kept_steps(list(self.strips), self.every)}

    def picture(self, title: str, photo: Image.Image) -> Image.Image | None:
        """Draws all strips, one row each below the photo; None if there are none.

        Args:
            title: one line above the strips.
            photo: the photo.
        """
        if not self.strips:
            return None
        rows = [
            [(f"step {step}, eta {eta:g}", Image.fromarray(pixels.numpy())) for eta, pixels in zip(self.etas, strip, strict=True)]
            for step, strip in self.strips.items()
        ]
        return sheet([[("photo", photo)], *rows], title, cell=SIDE)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything that a resumed fit needs, for a checkpoint."""
        return {f"{PREFIX}{step:06d}": strip for step, strip in self.strips.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], done: int) -> bool:
        """Loads a state that :meth:`state_dict` returned. Strips that this run would not make are left out.

        Args:
            state: tensors by name; those of other objects are ignored.
            done: number of finished steps of stage 2.

        Returns:
            Whether the state is valid; nothing is loaded otherwise.
        """
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        if not all(name.isdecimal() and 1 <= int(name) <= done and _is_strip(value) for name, value in own.items()):
            return False
        strips = {int(name): value for name, value in sorted(own.items())}
        fits = self.every > 0 and all(step % self.every == 0 and len(strip) == len(self.etas) for step, strip in strips.items())
        self.strips = strips if fits else {}
        return True


def _is_strip(value: Tensor) -> bool:
    """Returns whether a tensor holds the images of a strip."""
    return value.dtype == torch.uint8 and value.dim() == 4 and value.shape[3] == 3 and min(value.shape[:3]) > 0 and max(value.shape) <= SIDE
