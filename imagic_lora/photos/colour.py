"""Colours of any photo to 8-bit sRGB on white."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

_PIECE = 2**22  # pixels converted at once


def _srgb_on_white(image: Image.Image) -> Image.Image:
    """Piece by piece, so that it takes no more memory than the picture before and after."""
    ends = _black_and_white(image)
    gray = ends or image.mode in ("1", "L", "LA", "La")
    mode = "L" if gray else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    to_srgb = _transform(image.info.get("icc_profile"), mode)
    picture = Image.new("RGB", image.size, "white")
    wide = min(image.width, _PIECE)
    high = _PIECE // wide
    for top, left in itertools.product(range(0, image.height, high), range(0, image.width, wide)):
        box = (left, top, min(left + wide, image.width), min(top + high, image.height))
        piece = image.crop(box)
        if piece.mode in ("RGBa", "La"):
            piece = piece.convert(piece.mode.upper())
        opacity = _opacity(piece)
        piece = _eight_bits(piece, *ends) if ends else piece.convert(mode)
        colours = ImageCms.applyTransform(piece, to_srgb) if to_srgb else None
        picture.paste(colours or piece.convert("RGB"), box, opacity)
    return picture


def _opacity(piece: Image.Image) -> Image.Image | None:
    """A mask of what is not transparent, or None if everything is opaque."""
    if piece.mode == "I;16" and "transparency" in piece.info:
        return Image.fromarray(np.asarray(piece) != piece.info["transparency"])
    return piece.convert("RGBA").getchannel("A") if piece.has_transparency_data else None


def _black_and_white(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and of white, if the picture has more than 8 bits.

    16-bit pictures take their full range. Where the range is not known, it is the least of 0 to 1 (with some highlights above it), 255 and
    65535 that holds the values.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        white = 4095 if tags.get(258) == (12,) else 65535
    else:
        least, most = cast(tuple[float, float], image.getextrema())
        if not -65535 <= least <= most <= 65535:
            raise ValueError(f"its values go from {least:g} to {most:g}")
        white = 1 if image.mode == "F" and most <= 2 else 255 if most <= 255 else 65535
    return (white, 0) if tags and tags.get(262, 0) == 0 else (0, white)


def _eight_bits(piece: Image.Image, black: float, white: float) -> Image.Image:
    values = (np.asarray(piece, dtype=np.float64) - black) / (white - black)
    if not np.isfinite(values).all():
        raise ValueError("not all its values are finite")
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _transform(profile: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the embedded profile to sRGB; one that cannot be read or is of another colour space is passed over, as browsers do."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    if mode == "LAB":
        return ImageCms.buildTransform(lab, srgb, mode, "RGB")
    if not isinstance(profile, bytes):
        return None
    profile = profile.replace(b"D2B", b"...")  # optional tags that take littleCMS minutes where they are hostile
    try:
        return ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
