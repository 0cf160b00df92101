"""What the model sees: tensors in [-1, 1]. What people see: PNGs that say how they were made, labelled sheets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """A photo as the model sees it.

    Args:
        pixels: ``[1, 3, H, W]`` in [-1, 1]; H and W are multiples of what the base asks for.
        box: where the photo lies on it, ``(left, top, right, bottom)``; the rest repeats the edge.
        size: the photo's own ``(width, height)``.
    """

    pixels: Tensor
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def restored(self, picture: Image.Image) -> Image.Image:
        """A picture of the canvas's size, back at the photo's own size and shape."""
        picture = picture.crop(self.box)
        return picture if picture.size == self.size else picture.resize(self.size, Image.Resampling.LANCZOS)

    def photo(self) -> Image.Image:
        """The photo itself, as far as its pixels are still here."""
        return self.restored(to_image(self.pixels[0]))


def to_canvas(image: Image.Image, resolution: int, multiple: int) -> Canvas:
    """The photo scaled to an area of at most ``resolution`` squared, never squashed: what its shape lacks to whole multiples is padded.

    Args:
        image: RGB, any size and shape.
        resolution: in pixels.
        multiple: both sides of the canvas are multiples of it.
    """
    width, height = image.size
    scale = resolution / math.sqrt(width * height)
    wide = max(multiple, int(width * scale + 1e-6) // multiple * multiple)
    high = max(multiple, int(height * scale + 1e-6) // multiple * multiple)
    longest = max(multiple, resolution * resolution // multiple // multiple * multiple)  # the longest side of a very thin canvas
    wide, high = min(wide, longest), min(high, longest)
    scale = min(wide / width, high / height)
    inner = (max(1, min(wide, round(width * scale))), max(1, min(high, round(height * scale))))
    scaled = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS)
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    padded = np.pad(np.asarray(scaled), ((top, high - inner[1] - top), (left, wide - inner[0] - left), (0, 0)), mode="edge")
    return Canvas(to_pixels(Image.fromarray(padded)), (left, top, left + inner[0], top + inner[1]), image.size)


def to_pixels(image: Image.Image) -> Tensor:
    """A tensor ``[1, 3, H, W]`` in [-1, 1] of an RGB image; :func:`to_image` gives the image back exactly."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """An image of a tensor ``[3, H, W]`` in [-1, 1], rounded as diffusers does."""
    array = ((pixels.detach().cpu().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)
