"""Files of images with any metadata, and readings of them."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from torture.photos import Tags, _chunk, _directory, _png, _profile, _tiff

from imagic_lora.photos.reading import read_photo

SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RGB_TAGS: Tags = {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bytes_of(image: Image.Image, format: str, **options: Any) -> bytes:
    """What an image is saved as."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read_bytes(data: bytes, folder: Path) -> np.ndarray:
    """The pixels of a file of these bytes."""
    path = folder / "photo"
    path.write_bytes(data)
    return np.asarray(read_photo(path).image)


def linear_profile() -> bytes:
    """The profile of sRGB's primaries with linear light: Pillow's sRGB with its tone curve replaced by a gamma of 1."""
    profile = bytearray(SRGB_PROFILE)
    start = profile.index(b"para", 128 + 4 + 12 * struct.unpack(">I", profile[128:132])[0])
    profile[start + 8 : start + 10] = struct.pack(">H", 0)
    profile[start + 12 : start + 16] = struct.pack(">i", 1 << 16)
    return bytes(profile)


def profile_with_cicp(primaries: int, transfer: int) -> bytes:
    """A profile whose code points are its only true statement."""
    return _profile(b"RGB ", {b"cicp": b"cicp\0\0\0\0" + bytes([primaries, transfer, 0, 1])})


def png(pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8 bits, gray or RGB, with chunks before its pixels."""
    gray = pixels.ndim == 2
    rows = [row.tobytes() for row in pixels]
    return _png(pixels.shape[1], pixels.shape[0], 8, 0 if gray else 2, rows, b"".join(_chunk(*chunk) for chunk in chunks))


def tiff(pixels: np.ndarray, tags: Tags | None = None) -> bytes:
    """A TIFF of RGB with more tags."""
    return _tiff(pixels.shape[1], pixels.shape[0], {**RGB_TAGS, **(tags or {})}, pixels.tobytes())


def exif_colours(colour_space: int, interoperability: bytes = b"", at: int = 8) -> bytes:
    """Directories of EXIF: the first if it stands at 8, that of EXIF, that of interoperability."""
    first: Tags = {34665: (4, [0])}
    start = at + len(_directory(first, "<", at)) if at == 8 else at
    exif: dict[int, Any] = {40961: (3, [colour_space])} | ({40965: (4, [0])} if interoperability else {})
    end = start + len(_directory(exif, "<", start))
    if interoperability:
        exif[40965] = (4, [end])
    data = _directory(exif, "<", start)
    if interoperability:
        data += struct.pack("<HHHI4sI", 1, 1, 2, 4, interoperability, 0)
    return (b"II*\0" + struct.pack("<I", 8) + _directory({34665: (4, [start])}, "<", 8) if at == 8 else b"") + data


def tiff_of_exif(pixels: np.ndarray, colour_space: int, interoperability: bytes) -> bytes:
    """A TIFF with a directory of EXIF."""
    at = len(tiff(pixels, {34665: (4, [0])}))
    return tiff(pixels, {34665: (4, [at])}) + exif_colours(colour_space, interoperability, at)


def bmp(
    pixel: tuple[int, int, int, int], size: int, space: bytes = b"", ends: bytes = bytes(48), profile: bytes = b"", masks: bool = False
) -> bytes:
    """A BMP of 8 x 8 pixels with a header of 108 or 124 bytes.

    Args:
        pixel: red, green, blue, alpha.
        size: of the header.
        space: colour space of the header.
        ends: endpoints and gammas of a calibrated space.
        profile: behind the pixels.
        masks: whether the header declares alpha.
    """
    red, green, blue, alpha = pixel
    body = bytes([blue, green, red, alpha]) * 64
    head = struct.pack("<IiiHHIIiiII", size, 8, 8, 1, 32, 3 if masks else 0, len(body), 0, 0, 0, 0)
    head += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000 if masks else 0) + space.ljust(4, b"\0") + ends
    if size == 124:
        head += struct.pack("<4I", 4, size + len(body), len(profile), 0)
    return struct.pack("<2sIHHI", b"BM", 14 + size + len(body) + len(profile), 0, 0, 14 + size) + head + body + profile


def heic(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    """A HEIC file with options of ``pillow_heif``'s ``save`` and metadata; it turns as its EXIF says, by its boxes."""
    pillow_heif = pytest.importorskip("pillow_heif")
    file, out = pillow_heif.from_bytes(mode, pixels.shape[1::-1], pixels.tobytes()), io.BytesIO()
    file.info.update({key: options.pop(key) for key in ("exif", "xmp", "icc_profile", "icc_profile_type") if key in options})
    file.save(out, **{"quality": 95, "chroma": 444, **options})
    return out.getvalue()


def avif(pixels: np.ndarray, nclx: tuple[int, int] | None = None, **options: Any) -> bytes:
    """An AVIF file, with the code points of its primaries and its transfer characteristics."""
    data = bytearray(bytes_of(Image.fromarray(pixels), "AVIF", **{"quality": 95, "subsampling": "4:4:4", **options}))
    if nclx:
        at = data.index(b"nclx") + 4
        data[at : at + 4] = struct.pack(">HH", *nclx)
    return bytes(data)


def with_property(data: bytes, kind: bytes, body: bytes) -> bytes:
    """An AVIF or HEIC file whose ICC profile is replaced by another property of the same size, so that no offset changes."""
    at = min(place for place in (data.find(b"colrprof"), data.find(b"colrrICC")) if place > 0)
    end = at - 4 + int.from_bytes(data[at - 4 : at], "big")
    before, place = 0, data.index(b"ipco") + 4
    while place < at - 4:
        before, place = before + 1, place + int.from_bytes(data[place : place + 4], "big")
    start = data.index(b"ipma") + 15
    entries = data[start : start + data[start - 1]]
    if kind in (b"clap", b"imir", b"irot"):  # essential properties
        entries = bytes(0x80 | entry if entry == before + 1 else entry for entry in entries)
    data = data[:start] + entries + data[start + len(entries) :]
    return data[:at] + kind + body.ljust(end - at - 4, b"\0") + data[end:]
