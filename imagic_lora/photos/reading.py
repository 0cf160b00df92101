"""Reading a photo or a mask from an untrusted file: it is decoded correctly or rejected, in bounded time and memory."""

from __future__ import annotations

import hashlib
import json
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps

from ..core.errors import ImagicError
from .colour.conversion import srgb_on_white
from .files.declared import declared_colours
from .files.formats import REMEDY, detect_format
from .files.opening import MAX_PIXELS, open_image
from .png import METADATA_KEY

MAX_BYTES = 2**28  # of a file
_MAX_CODED = {
    "JPEG": 2**26,
    "WEBP": 2**26,
    "AVIF": 2**25,
    "HEIF": 2**25,
}  # bytes; slow decoders, or ones that copy the data
_MAX_EXIF = 2**20  # bytes
_MAX_TINT = 32  # levels between two channels of gray; lossy formats make some
_SUFFIXES = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "HEIF": ".heic",
    "JPEG": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "TIFF": ".tiff",
    "WEBP": ".webp",
}


@dataclass(frozen=True)
class Photo:
    """A photo that was read from a file: upright, sRGB, on white.

    Args:
        image: mode RGB, at its original size.
        sha256: hash of the file's bytes, in hexadecimal.
        data: the file's bytes.
        suffix: ending of a file of this format, with the dot.
    """

    image: Image.Image
    sha256: str
    data: bytes
    suffix: str


@dataclass(frozen=True)
class Mask:
    """A mask that was read from a file.

    Args:
        image: mode L; white may change, black stays.
        sha256: hash of the file's bytes, in hexadecimal.
    """

    image: Image.Image
    sha256: str


def read_photo(path: Path) -> Photo:
    """Reads a photo, rotates it by its orientation, converts it to sRGB from the colour space it declares and composites it on white.

    The format is detected from the file's content. An animation or a file of several pages gives its first image.

    Raises:
        ImagicError: the file does not exist, is not a regular file, is empty, is not in a supported format, is broken, says what is not
            supported, shows nothing, or has more than :data:`~imagic_lora.photos.files.opening.MAX_PIXELS` pixels.
    """
    with _imagic_errors(path):
        image_format, data = _read_bytes(path)
        image = open_image(image_format, data)
        image.load()
        declared = declared_colours(image_format, data, image)
        if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
            image = image.convert("RGB")  # like browsers: programs that fill no alpha channel declare one
        orientation = _orientation(image)
        converted = srgb_on_white(image, declared)
        del image  # rotating needs as much memory again
        return Photo(_upright(converted, orientation), hashlib.sha256(data).hexdigest(), data, _SUFFIXES[image_format])


def read_mask(path: Path, size: tuple[int, int], empty: bool = False) -> Mask:
    """Reads a mask of what may change in a photo. Transparent pixels are black, and its orientation counts; a colour profile does not.

    Args:
        path: an image of a format that :func:`read_photo` reads, with 8 bits per channel or less.
        size: width and height of the photo.
        empty: whether a mask may be black everywhere.

    Raises:
        ImagicError: the file is no image that can be read; it has another size, colours, more bits, or no pixel that may change.
    """
    with _imagic_errors(path):
        image_format, data = _read_bytes(path)
        image = open_image(image_format, data)
        image.load()
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ImagicError(f"is of mode {image.mode}", "a gray image with 8 bits per channel", "save the mask as an 8-bit PNG")
        orientation, image = _orientation(image), image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        channels = _upright(Image.alpha_composite(black, image), orientation).split()[:3]
        if channels[0].size != size:
            expected = f"the size of the photo, {size[0]}x{size[1]} pixels"
            raise ImagicError(f"has {channels[0].width}x{channels[0].height} pixels", expected, "draw the mask on the photo, upright")
        tints = (ImageChops.difference(channels[1], channel) for channel in (channels[0], channels[2]))
        if any(np.asarray(tint).max() > _MAX_TINT for tint in tints):
            raise ImagicError("has colours", "a gray mask: white may change, black stays", "save the mask as a gray PNG, not the photo")
        if channels[0].getextrema()[1] == 0 and not empty:
            raise ImagicError("is black everywhere", "white pixels where the photo may change", "paint what may change white")
        return Mask(channels[1], hashlib.sha256(data).hexdigest())


@contextmanager
def _imagic_errors(path: Path) -> Iterator[None]:
    """Converts every exception into an :class:`ImagicError` that names the file, and suppresses warnings."""
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decoders, on metadata; what could change pixels is checked by photos/files
            yield
    except ImagicError as error:
        raise ImagicError(f"{name} {error.got}", error.expected, error.remedy) from error
    except (Image.DecompressionBombError, MemoryError) as error:  # running out of memory means that the file claims too large a size
        why = str(error) or "not enough memory"
        raise ImagicError(f"{name} is too large ({why})", f"at most {MAX_PIXELS // 10**6} megapixels", "scale it down first") from error
    except Exception as error:  # decoders raise anything: struct.error, KeyError, ZeroDivisionError, RecursionError
        raise ImagicError(f"{name} is broken ({_reason(error)})", "a complete image file", REMEDY) from error


def _reason(error: Exception) -> str:
    """What a decoder says in words. Other exceptions name parts of its code."""
    cause = error.__cause__ if isinstance(error, SyntaxError) and error.__cause__ else error  # Pillow wraps some in a SyntaxError
    in_words = isinstance(cause, (OSError, RuntimeError, SyntaxError, ValueError)) and not isinstance(cause, RecursionError)
    return (in_words and str(cause)) or "its structure is invalid"


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """The format of an image file, by its name in Pillow, and all its bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may block forever, and a device may be endless
            raise ImagicError("cannot be read (it is not a regular file)", "an image file", "check the path")
        with path.open("rb") as file:
            head = file.read(256)
            if not head:
                raise ImagicError("is empty", "an image file", REMEDY)
            image_format = detect_format(head)
            limit = _MAX_CODED.get(image_format, MAX_BYTES)
            data = head + file.read(limit + 1 - len(head)) if status.st_size <= limit else b""
    except (OSError, ValueError) as error:  # ValueError: the path is invalid
        why = getattr(error, "strerror", None) or error
        raise ImagicError(f"cannot be read ({why})", "an image file", "check the path") from error
    if not 0 < len(data) <= limit:
        raise ImagicError(f"is too large ({status.st_size} bytes)", f"at most {limit >> 20} MiB of {image_format}", "scale it down first")
    return image_format, data


def _orientation(image: Image.Image) -> Any:
    """The orientation in the EXIF data, or None. Like browsers, treats an image with unreadable EXIF as upright."""
    if len(image.info.get("exif") or b"") > _MAX_EXIF:
        raise ValueError("its EXIF is too large")
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything for broken EXIF: struct.error, SyntaxError, KeyError
        return None


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    """Rotates and flips an image, in place, so that it is upright."""
    if orientation is not None:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(image, in_place=True)
    return image


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata that :func:`~imagic_lora.photos.png.write_png` stored in a PNG file.

    Raises:
        ImagicError: the file cannot be read, is not a PNG, or has no imagic-lora metadata.
    """
    with _imagic_errors(path):
        image_format, data = _read_bytes(path)
        metadata = json.loads(open_image(image_format, data).info.get(METADATA_KEY, "null")) if image_format == "PNG" else None
        if not isinstance(metadata, dict):
            remedy = "use the original file: saving it again in another program removes the metadata"
            raise ImagicError("has no imagic-lora metadata", "a PNG written by imagic-lora edit", remedy)
        return metadata
