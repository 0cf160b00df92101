"""Conversion of an image of any mode to 8-bit sRGB on a white background."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

from ...core.errors import ImagicError
from .hdr import ToneMapping
from .spaces import ColourSpace, icc_profile

TILE_PIXELS = 2**22  # pixels converted at once
_MODES = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # the mode of images that an ICC profile of a colour space is for
Box = tuple[int, int, int, int]
Conversion = Callable[[Image.Image], Image.Image]


def srgb_on_white(image: Image.Image, declared: bytes | ColourSpace | None) -> Image.Image:
    """Converts an image to sRGB and composites it on white.

    Works tile by tile, so the peak memory is that of the image before and after the conversion.

    Args:
        image: of any mode that Pillow reads.
        declared: the image's ICC profile or colour space; None for sRGB.

    Returns:
        An RGB image of the same size.

    Raises:
        ImagicError: every pixel is fully transparent, or the range of the values is unknown.
        ValueError: not all values are finite.
    """
    value_range = _black_and_white(image)
    to_srgb = _to_srgb(image, declared, gray=value_range is not None or image.mode in ("1", "L", "LA", "La"))
    result, visible = Image.new("RGB", image.size, "white"), False
    for box in _boxes(image.size):
        tile = image.crop(box)
        if tile.mode in ("RGBa", "La"):
            tile = tile.convert(tile.mode.upper())
        opacity = _opacity(tile)
        visible = visible or opacity is None or opacity.getbbox() is not None
        result.paste(to_srgb(_eight_bits(tile, *value_range) if value_range else tile), box, opacity)
    if not visible:
        raise ImagicError("is fully transparent", "a photo that is visible", "remove its alpha channel or its transparent colour")
    return result


def _boxes(size: tuple[int, int]) -> Iterator[Box]:
    """The tiles of an image as ``(left, top, right, bottom)``."""
    tile_width = min(size[0], TILE_PIXELS)
    tile_height = TILE_PIXELS // tile_width
    for top, left in itertools.product(range(0, size[1], tile_height), range(0, size[0], tile_width)):
        yield left, top, min(left + tile_width, size[0]), min(top + tile_height, size[1])


def _opacity(tile: Image.Image) -> Image.Image | None:
    """The opacity of each pixel as a mask, or None if every pixel is opaque."""
    if tile.mode == "I;16" and "transparency" in tile.info:
        return Image.fromarray(np.asarray(tile) != tile.info["transparency"])
    return tile.convert("RGBA").getchannel("A") if tile.has_transparency_data else None


def _to_srgb(image: Image.Image, declared: bytes | ColourSpace | None, gray: bool) -> Conversion:
    """The conversion of a tile to mode RGB in sRGB, without its opacity."""
    if image.mode == "LAB":
        return _by_transform(ImageCms.createProfile("LAB"), "LAB")
    if isinstance(declared, ColourSpace):
        if declared.is_srgb or image.mode == "CMYK":
            declared = None
        elif declared.hdr:
            tone_mapping = ToneMapping(declared, max(_highest(image.crop(box)) for box in _boxes(image.size)))
            return lambda tile: tone_mapping(tile.convert("RGB"))
        else:
            declared = icc_profile(declared)
    return (declared and _by_profile(declared, image.mode, gray)) or (lambda tile: tile.convert("RGB"))


def _highest(tile: Image.Image) -> int:
    """The largest value of any colour channel."""
    return max(high for _, high in cast(tuple[tuple[int, int], ...], tile.convert("RGB").getextrema()))


def _by_profile(profile: bytes, mode: str, gray: bool) -> Conversion | None:
    """The conversion by an ICC profile. Like browsers, ignores a profile that is unreadable or of another colour space."""
    profile_mode = _MODES.get(profile[16:20])
    if profile_mode is None or profile_mode not in (("L", "RGB") if gray else ("CMYK",) if mode == "CMYK" else ("RGB",)):
        return None
    try:  # D2B are optional tags; malicious ones make littleCMS run for minutes
        return _by_transform(ImageCms.ImageCmsProfile(io.BytesIO(profile.replace(b"D2B", b"..."))), profile_mode)
    except (ImageCms.PyCMSError, OSError):
        return None


def _by_transform(profile: Any, mode: str) -> Conversion:
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    return lambda tile: cast(Image.Image, ImageCms.applyTransform(tile.convert(mode), transform))


def _black_and_white(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and of white of an image with more than 8 bits per channel; None for other images. 16 bits use their range."""
    if not image.mode.startswith(("I", "F")):
        return None
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        white = 4095 if tags.get(258) == (12,) else 65535
    else:
        white = _unstated_white(image)
    return (white, 0) if tags and tags.get(262, 0) == 0 else (0, white)


def _unstated_white(image: Image.Image) -> int:
    """The white of an image of 32 bits: 1 for floating-point values up to 2, 255 for values up to 510, else 65535.

    Values above white are highlights, which are clipped. Values that hardly use such a range belong to another one: light with strong
    highlights, or 12 bits.

    Raises:
        ImagicError: the values use no range.
    """
    lowest, highest = cast(tuple[float, float], image.getextrema())
    white = 1 if image.mode == "F" and highest <= 2 else 255 if highest <= 510 else 65535
    sample = image.resize((min(image.width, 1000), min(image.height, 1000)), Image.Resampling.NEAREST)
    unused = white > (1 if image.mode == "F" else 255) and not np.percentile(np.asarray(sample), 99) >= white / 16
    if unused or not -white <= lowest <= highest <= 65535:
        expected = "values that use a range from 0 to 1, to 255 or to 65535"
        raise ImagicError(
            f"has values from {lowest:g} to {highest:g} of an unknown range",
            expected,
            "tone-map it and save it with 8 or 16 bits per channel",
        )
    return white


def _eight_bits(tile: Image.Image, black: float, white: float) -> Image.Image:
    """Scales values from black to white to 0 to 255, clipped."""
    values = (np.asarray(tile, dtype=np.float64) - black) / (white - black)
    if not np.isfinite(values).all():
        raise ValueError("not all its values are finite")
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
