"""Conversion of a photo of any mode to 8-bit sRGB on a white background."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

TILE_PIXELS = 2**22  # pixels converted at once


def srgb_on_white(image: Image.Image) -> Image.Image:
    """Converts an image to sRGB and composites it on white.

    Works tile by tile, so the peak memory is that of the image before and after the conversion.

    Args:
        image: of any mode that Pillow reads.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: the image has values that are not finite or outside every known range.
    """
    value_range = _black_and_white(image)
    gray = value_range or image.mode in ("1", "L", "LA", "La")
    mode = "L" if gray else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    to_srgb = _transform(image.info.get("icc_profile"), mode)
    result = Image.new("RGB", image.size, "white")
    tile_width = min(image.width, TILE_PIXELS)
    tile_height = TILE_PIXELS // tile_width
    for top, left in itertools.product(range(0, image.height, tile_height), range(0, image.width, tile_width)):
        box = (left, top, min(left + tile_width, image.width), min(top + tile_height, image.height))
        tile = image.crop(box)
        if tile.mode in ("RGBa", "La"):
            tile = tile.convert(tile.mode.upper())
        opacity = _opacity(tile)
        tile = _eight_bits(tile, *value_range) if value_range else tile.convert(mode)
        colours = ImageCms.applyTransform(tile, to_srgb) if to_srgb else None
        result.paste(colours or tile.convert("RGB"), box, opacity)
    return result


def _opacity(tile: Image.Image) -> Image.Image | None:
    """The opacity of each pixel as a mask, or None if every pixel is opaque."""
    if tile.mode == "I;16" and "transparency" in tile.info:
        return Image.fromarray(np.asarray(tile) != tile.info["transparency"])
    return tile.convert("RGBA").getchannel("A") if tile.has_transparency_data else None


def _black_and_white(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and of white of an image with more than 8 bits per channel; None for other images.

    A 16-bit image uses its full range. If the range is unknown, it is the smallest of 0 to 1, 0 to 255 and 0 to 65535 that contains the
    values; floating-point images from 0 to 1 may have highlights up to 2.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        white = 4095 if tags.get(258) == (12,) else 65535
    else:
        lowest, highest = cast(tuple[float, float], image.getextrema())
        if not -65535 <= lowest <= highest <= 65535:
            raise ValueError(f"its values go from {lowest:g} to {highest:g}")
        white = 1 if image.mode == "F" and highest <= 2 else 255 if highest <= 255 else 65535
    return (white, 0) if tags and tags.get(262, 0) == 0 else (0, white)


def _eight_bits(tile: Image.Image, black: float, white: float) -> Image.Image:
    """Scales values from black to white to 0 to 255, clipped."""
    values = (np.asarray(tile, dtype=np.float64) - black) / (white - black)
    if not np.isfinite(values).all():
        raise ValueError("not all its values are finite")
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _transform(profile: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from the embedded profile to sRGB. Like browsers, ignores a profile that is unreadable or of another colour space."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    if mode == "LAB":
        return ImageCms.buildTransform(lab, srgb, mode, "RGB")
    if not isinstance(profile, bytes):
        return None
    profile = profile.replace(b"D2B", b"...")  # optional tags; malicious ones make littleCMS run for minutes
    try:
        return ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
