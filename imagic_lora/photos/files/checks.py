"""Checks of a file before it is decoded: what would take too long, and what Pillow would silently read wrong."""

from __future__ import annotations

import re
import struct

from PIL import TiffImagePlugin

from ...core.errors import ImagicError
from .boxes import primary_properties
from .tags import BYTE_TYPES, first_directory

_MAX_SCANS = 100  # of a JPEG
_MAX_JPEG_EXIF = 16  # segments
_MAX_COMPRESSED_CHUNKS = 500  # of a PNG
_MAX_TAG_NUMBERS = 2**18  # in the tags of a TIFF file
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # start of a segment of a JPEG
_HIDING_TEXT = re.compile(rb"(?:tEXt|zTXt|iTXt)(icc_profile|transparency)\0")
_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _INK_SET, _DOT_RANGE, _SAMPLE_FORMAT = 254, 258, 259, 262, 332, 336, 339
_PREVIEW, _MASK = 1, 4  # kinds of subfile
_CMYK, _SIGNED, _FLOAT = 5, 2, 3
_INDEXED, _DECODE = 346, 433
_TONE_MAP = "tone-map it and save it with 8 or 16 bits per channel"


def slow_error() -> ImagicError:
    """The error for a file that would keep a decoder busy for long."""
    return ImagicError(
        "is stored in a way that takes too long to read", "an image file without unusual structure", "save it as PNG or JPEG"
    )


def check_jpeg(data: bytes) -> None:
    """Rejects a JPEG with many EXIF segments or many scans; even a scan of ten bytes takes time for all pixels."""
    at = scans = exif = 0
    for _ in range(10_000):
        marker = _MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            return
        at = marker.end()
        scans += marker[1] == b"\xda"
        exif += data.startswith(b"Exif\0\0", at + 2)
        if scans > _MAX_SCANS or exif > _MAX_JPEG_EXIF:
            break
        at += int.from_bytes(data[at : at + 2], "big")
    raise slow_error()


def check_png(data: bytes) -> None:
    """Rejects a PNG with many compressed chunks, each of which can decompress to a megabyte, and what Pillow would read wrong."""
    if sum(map(data.count, (b"iCCP", b"zTXt", b"iTXt"))) > _MAX_COMPRESSED_CHUNKS:
        raise slow_error()
    if data[12:16] == b"CgBI":
        raise ImagicError("is a PNG in the variant of iOS apps (CgBI)", "a standard PNG", "export it as PNG or JPEG from an image editor")
    if data[24:26] == b"\x10\x02" and b"tRNS" in data[: data.find(b"IDAT")]:  # Pillow would compare 8 bits of 16
        expected = "8 bits per channel, or an alpha channel"
        raise ImagicError("has a transparent colour of 16 bits", expected, "save it with 8 bits per channel or with an alpha channel")
    if text := _HIDING_TEXT.search(data):  # Pillow would take it for the profile or the transparency
        raise ImagicError(f"has a text with the keyword {text[1].decode()}", "another keyword", "save it without metadata")


def check_gif(data: bytes) -> None:
    """Rejects a GIF with a colour profile, which Pillow does not read."""
    if b"ICCRGBG1012" in data[: 2**20]:
        raise ImagicError("is a GIF with a colour profile", "a GIF in sRGB", "convert it to sRGB and save it as PNG")


def check_tiff(data: bytes) -> None:
    """Rejects a TIFF file whose tags would fill the memory as Python numbers, and tags that Pillow ignores."""
    tags = first_directory(data)
    if sum(count for kind, count, _ in tags.entries.values() if kind not in BYTE_TYPES) > _MAX_TAG_NUMBERS:
        raise slow_error()
    subfile = int(tags.number(_SUBFILE, 0))
    if subfile & _PREVIEW:
        remedy = "export it as JPEG or TIFF from a raw converter"
        raise ImagicError("holds only a preview, like a camera raw file", "a developed photo", remedy)
    compression = int(tags.number(_COMPRESSION, 1))
    formats = tags.numbers(_SAMPLE_FORMAT)
    dots, highest = tags.numbers(_DOT_RANGE), 2 ** min(tags.number(_BITS, 8), 32) - 1
    reasons = {
        "begins with a transparency mask": subfile & _MASK,
        f"is compressed by the method {compression}": compression not in TiffImagePlugin.COMPRESSION_INFO,
        "has signed values": _SIGNED in formats and tags.number(_BITS, 1) <= 8,
        "has inks other than CMYK": tags.number(_PHOTOMETRIC, 0) == _CMYK and tags.number(_INK_SET, 1) != 1,
        "has inks of a limited range": any(dots[::2]) or any(dot != highest for dot in dots[1::2]),
        "has indexed or scaled colours": tags.number(_INDEXED, 0) or _DECODE in tags.entries,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ImagicError(reason, "a TIFF of gray, RGB, CMYK or Lab", "save it as RGB TIFF or PNG")


def unknown_pixels(data: bytes) -> ImagicError:
    """The error for a TIFF whose pixels Pillow does not know."""
    tags = first_directory(data)
    bits, formats = tags.numbers(_BITS) or (1,), tags.numbers(_SAMPLE_FORMAT) or (1,)
    kind, remedy = ("floating-point", _TONE_MAP) if _FLOAT in formats else ("whole", "save it as RGB TIFF or PNG")
    got = f"has pixels of {len(bits)} {kind} numbers of {bits[0]:g} bits, photometric interpretation {tags.number(_PHOTOMETRIC, 0):g}"
    return ImagicError(got, "gray, RGB or CMYK with 8 or 16 bits per channel", remedy)


def check_aperture(data: bytes, size: tuple[int, int]) -> None:
    """Rejects an AVIF that a clean aperture crops, which Pillow ignores."""
    for kind, body in primary_properties(data):
        if kind == b"clap" and len(body) >= 16:
            width, width_below, height, height_below = struct.unpack(">4I", body[:16])
            if (width, height) != (size[0] * width_below, size[1] * height_below):
                raise ImagicError("is an AVIF that is cropped by its clean aperture", "an uncropped AVIF", "save it again, cropped")
