"""Masks of the area that may change: from the photo to the latents and back, and sampling inside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..bases.architecture import Architecture
from ..core.errors import ImagicError
from ..photos.canvas import Canvas, to_canvas, to_image
from ..sampling.trajectory import Predict, Trajectory


def binary(mask: Image.Image) -> Image.Image:
    """Returns a mask, mode L, of 0 and 255 only: values of 128 and above become 255."""
    return mask.point([0] * 128 + [255] * 128)


def canvas_mask(architecture: Architecture, mask: Image.Image) -> Tensor:
    """Returns the mask of a request on the canvas of the photo.

    Args:
        architecture: configs of the base.
        mask: mode L, of the size of the photo; values of 128 and above may change.

    Returns:
        1 where pixels may change and 0 elsewhere, ``[1, 1, H, W]`` in fp32 on the CPU.
    """
    return (to_canvas(binary(mask).convert("RGB"), architecture.resolution, architecture.size_multiple).pixels[:, :1] > 0).float()


def latent_mask(architecture: Architecture, mask: Image.Image) -> Tensor:
    """Returns the mask of a request at the size of the latents, by the nearest pixel: as :func:`canvas_mask`, but ``[1, 1, h, w]``."""
    pixels, factor = canvas_mask(architecture, mask), architecture.vae_scale_factor
    return interpolate(pixels, (pixels.shape[2] // factor, pixels.shape[3] // factor))


def check_area(architecture: Architecture, mask: Image.Image) -> None:
    """Raises ImagicError if a mask is not black everywhere, but nothing of it is left at the size of the latents."""
    if mask.getbbox() is None or latent_mask(architecture, mask).any():
        return
    if binary(mask).getbbox() is None:
        got, expected = f"a mask whose lightest value is {mask.getextrema()[1]}", "128 and above where the photo may change"
        raise ImagicError(got, expected, "paint that area white")
    got = f"a mask whose area is smaller than {architecture.vae_scale_factor} pixels at the resolution of the base"
    raise ImagicError(got, "a mask that covers at least one position of the latents", "enlarge the area of the mask")


def mask_image(canvas: Canvas, mask: Tensor) -> Image.Image:
    """Returns a mask of the latents as an image, mode L, of the size of the photo.

    Args:
        canvas: the photo.
        mask: ``[1, 1, h, w]`` in [0, 1].
    """
    pixels = interpolate(mask.float().cpu(), canvas.pixels.shape[2:])[0] * 2 - 1
    return canvas.restored(to_image(pixels.expand(3, -1, -1))).convert("L")


def sampled_inside(trajectory: Trajectory, predict: Predict, mask: Tensor, outside: Callable[[int], Tensor], start: int) -> Tensor:
    """Samples inside a mask. Outside it the latents are given at each position: those of the photo at its noise level.

    Args:
        trajectory: the noise levels.
        predict: returns the prediction of each step.
        mask: ``[1, 1, h, w]``: 1 may change, 0 may not.
        outside: returns the latents of the photo at a position, ``[1, C, h, w]``; at the clean end those of the photo itself.
        start: position that sampling starts from, with the latents of the photo.

    Returns:
        The clean latents, ``[1, C, h, w]``.
    """
    latents = outside(start)
    for step in trajectory.forwards(latents, predict, start):
        latents = step.latents = torch.where(mask > 0, step.latents, outside(step.end))
    return latents
