"""Scaling and padding a photo to a tensor in [-1, 1] for a model, and the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """A photo, or a region of it, as input of a model.

    Args:
        pixels: ``[1, 3, H, W]`` in [-1, 1]; H and W are multiples of the size multiple of the base.
        box: position of the photo on the canvas, ``(left, top, right, bottom)`` in pixels; the rest is padded by repeating the edge.
        size: original ``(width, height)`` of the photo, or of the region, in pixels.

    A canvas whose photo is not known, :meth:`unknown`, has a size but no values: they are on PyTorch's device ``meta``.
    """

    pixels: Tensor
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    @classmethod
    def unknown(cls, canvas: tuple[int, int], box: tuple[int, int, int, int], size: tuple[int, int]) -> Canvas:
        """The canvas of a photo that nobody gave.

        Args:
            canvas: its width and height in pixels.
            box, size: as of every canvas.
        """
        return cls(torch.empty(1, 3, canvas[1], canvas[0], device="meta"), box, size)

    @property
    def known(self) -> bool:
        """Whether it has the photo."""
        return not self.pixels.is_meta

    def restored(self, image: Image.Image) -> Image.Image:
        """Crops an image of the canvas's size to the box and scales it to the original size of the photo."""
        image = image.crop(self.box)
        return image if image.size == self.size else image.resize(self.size, Image.Resampling.LANCZOS)

    def photo(self) -> Image.Image:
        """The photo at its original size, reconstructed from the pixels of the canvas."""
        return self.restored(to_image(self.pixels[0]))


def to_canvas(image: Image.Image, resolution: int, multiple: int) -> Canvas:
    """Scales a photo to an area of at most ``resolution`` squared and pads it to whole multiples. The aspect ratio is kept.

    Args:
        image: RGB, of any size and aspect ratio.
        resolution: side of a square of the largest area, in pixels.
        multiple: width and height of the canvas are multiples of it, in pixels.
    """
    return fitted(image, canvas_size(*image.size, resolution, multiple))


def fitted(image: Image.Image, canvas: tuple[int, int]) -> Canvas:
    """Scales a photo to fit into a canvas and pads it by repeating its edge.

    Args:
        image: RGB, of any size and aspect ratio.
        canvas: width and height of the canvas in pixels.
    """
    (width, height), (canvas_width, canvas_height) = image.size, canvas
    scale = min(canvas_width / width, canvas_height / height)
    inner = (max(1, min(canvas_width, round(width * scale))), max(1, min(canvas_height, round(height * scale))))
    scaled = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS)
    left, top = (canvas_width - inner[0]) // 2, (canvas_height - inner[1]) // 2
    margins = ((top, canvas_height - inner[1] - top), (left, canvas_width - inner[0] - left), (0, 0))
    padded = np.pad(np.asarray(scaled), margins, mode="edge")
    return Canvas(to_pixels(Image.fromarray(padded)), (left, top, left + inner[0], top + inner[1]), image.size)


def canvas_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """Returns width and height of the canvas of a photo, in pixels.

    Args:
        width, height: of the photo, in pixels.
        resolution, multiple: as for :func:`to_canvas`.
    """
    scale = resolution / math.sqrt(width * height)
    canvas_width = max(multiple, int(width * scale + 1e-6) // multiple * multiple)
    canvas_height = max(multiple, int(height * scale + 1e-6) // multiple * multiple)
    longest = max(multiple, resolution * resolution // multiple // multiple * multiple)  # the longest side of a very thin canvas
    return min(canvas_width, longest), min(canvas_height, longest)


def middle_square(image: Image.Image) -> Image.Image:
    """Returns the largest square in the middle of an image."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB image to a tensor ``[1, 3, H, W]`` in [-1, 1]. :func:`to_image` is the exact inverse."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Converts a tensor ``[3, H, W]`` to an RGB image. Values are clamped to [-1, 1] and rounded as in diffusers."""
    array = ((pixels.detach().cpu().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)
