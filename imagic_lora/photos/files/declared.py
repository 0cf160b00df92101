"""The colour space that a file declares: by an ICC profile, by code points, by chromaticities, or by EXIF.

Each format's own rule decides if a file declares several: cICP before iCCP before sRGB before gAMA and cHRM in PNG; ICC before nclx in AVIF
and HEIC. EXIF counts only if nothing else does.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from ...core.errors import ImagicError
from ..colour.spaces import (
    ADOBE_RGB,
    SRGB,
    SRGB_PRIMARIES,
    ColourSpace,
    Primaries,
    of_chromaticities,
    of_code_points,
    power_curve,
    srgb_curve,
    table_curve,
)
from .boxes import primary_properties
from .tags import Directory, first_directory

Declared = bytes | ColourSpace | None
_HDR_TRANSFERS = (16, 18)
_HDR_PROFILE_NAME = b"ITUR_2100_PQ_FULL"  # by which PNG files state BT.2100 PQ, says the W3C note "Using the ITU BT.2100 PQ EOTF with PNG"
_EXIF, _COLOUR_SPACE, _INTEROPERABILITY, _INTEROPERABILITY_INDEX = 34665, 40961, 40965, 1
_BITS, _PHOTOMETRIC, _TRANSFER_FUNCTION, _WHITE_POINT, _PRIMARIES = 258, 262, 301, 318, 319
_MAX_TABLE = 3 * 2**16


def declared_colours(image_format: str, data: bytes, image: Image.Image) -> Declared:
    """The ICC profile or the colour space that a file declares; None if it declares none.

    Args:
        image_format: by its name in Pillow.
        data: the file.
        image: loaded.

    Raises:
        ImagicError: the colour space is not supported.
    """
    profile = image.info.get("icc_profile") or _late_profile(getattr(image, "icclist", []))
    profile = _of_profile(profile) if isinstance(profile, bytes) else None
    match image_format:
        case "PNG":
            declared = _of_png(data, profile)
        case "AVIF":
            declared = profile or _of_nclx(data)
        case "HEIF":
            declared = profile or _of_heif(image.info.get("nclx_profile"))
        case "BMP":
            declared = _of_bmp(data)
        case "TIFF":
            declared = profile or _of_tiff(first_directory(data))
        case _:
            declared = profile
    if declared is None:
        exif = data if image_format == "TIFF" else image.info.get("exif")
        declared = _of_exif(first_directory(exif)) if isinstance(exif, bytes) else None
    return declared


def _late_profile(segments: Sequence[bytes]) -> bytes | None:
    """The ICC profile of a JPEG that has it after the header of the frame; Pillow collects it and leaves it out."""
    parts = sorted(segments)
    return b"".join(part[14:] for part in parts) if parts and parts[0][13:14] == bytes([len(parts) % 256]) else None


def _of_profile(profile: bytes) -> bytes | ColourSpace:
    """The profile, or the code points of its tag ``cicp`` if they state HDR: the rest of the profile is for programs that know none."""
    count = int.from_bytes(profile[128:132], "big")
    table = profile[132 : 132 + 12 * min(count, 100)]
    for name, at, size in struct.iter_unpack(">4sII", table[: len(table) // 12 * 12]):
        cicp = profile[at + 8 : at + 12]
        if name == b"cicp" and size == 12 and len(cicp) == 4 and cicp[1] in _HDR_TRANSFERS and profile[16:20] == b"RGB ":
            return of_code_points(cicp[0], cicp[1], cicp[3] > 0)
    return profile


def _of_png(data: bytes, profile: bytes | ColourSpace | None) -> Declared:
    """By the first of cICP, iCCP, sRGB, gAMA with cHRM (PNG, third edition)."""
    chunks = _png_chunks(data)
    if (cicp := chunks.get(b"cICP")) is not None:
        if len(cicp) != 4 or cicp[2] or cicp[3] > 1:
            raise ImagicError(f"has the chunk cICP {list(cicp)}", "four bytes, the third 0, the fourth 0 or 1", "save it again as PNG")
        return of_code_points(cicp[0], cicp[1], cicp[3] == 1)
    if chunks.get(b"iCCP", b"").startswith(_HDR_PROFILE_NAME + b"\0"):
        return of_code_points(9, 16)
    if profile or b"sRGB" in chunks:
        return profile or SRGB
    gamma, chromaticities = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    numbers = struct.unpack(">8I", chromaticities) if len(chromaticities) == 32 else ()
    primaries = cast(Primaries, tuple(number / 100_000 for number in numbers) or SRGB_PRIMARIES)
    exponent = 100_000 / max(int.from_bytes(gamma, "big"), 1) if len(gamma) == 4 and any(gamma) else None
    if not numbers and exponent is None:
        return None
    of_srgb = np.allclose(primaries, SRGB_PRIMARIES, atol=1.5e-3)
    # PNG files state sRGB as a power of 2.2 for programs that know no more; like libpng, take all within 5% of it for that
    curve = srgb_curve if exponent is None or (of_srgb and abs(exponent / 2.2 - 1) < 0.05) else power_curve(exponent)
    return of_chromaticities(primaries, (curve,)) or of_chromaticities(SRGB_PRIMARIES, (curve,))


def _png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The first of each colour chunk before the pixels."""
    chunks, at = {}, 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"IDAT":
            break
        if name in (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"):
            chunks.setdefault(name, data[at + 8 : at + 8 + size])
        at += 12 + size
    return chunks


def _of_nclx(data: bytes) -> ColourSpace | None:
    """By the property nclx of an AVIF file. Its matrix and its range are those of the coded YCbCr, which the decoder applies."""
    nclx = next((body[4:8] for kind, body in primary_properties(data) if kind == b"colr" and body.startswith(b"nclx")), b"")
    return of_code_points(*struct.unpack(">HH", nclx)) if len(nclx) == 4 else None


def _of_heif(nclx: Mapping[str, Any] | None) -> ColourSpace | None:
    """By the property nclx of a HEIC file, as pillow_heif gives it."""
    return of_code_points(int(nclx["color_primaries"]), int(nclx["transfer_characteristics"])) if nclx else None


def _of_bmp(data: bytes) -> Declared:
    """By the header of version 4 or 5. A calibrated space, which other programs take for sRGB, must be that."""
    size, kind = int.from_bytes(data[14:18], "little"), data[70:74]
    if size not in (108, 124) or len(data) < 14 + size:
        return None
    if kind == b"DEBM" and size == 124:
        at, length = struct.unpack_from("<II", data, 126)
        return _of_profile(data[14 + at : 14 + at + length])
    ends = np.array(struct.unpack_from("<9i", data, 74), float).reshape(3, 3)
    chromaticities = ends[:, :2] / np.maximum(ends.sum(1, keepdims=True), 1)
    gammas = np.array(struct.unpack_from("<3I", data, 110)) / 65536  # some write 2.2, some its inverse
    of_srgb = np.allclose(chromaticities.ravel(), SRGB_PRIMARIES[2:], atol=0.01) and all(abs(abs(np.log(gammas)) - np.log(2.2)) < 0.05)
    if kind == b"KNIL" or (kind == bytes(4) and ends.any() and not of_srgb):
        what = "a colour profile in another file" if kind == b"KNIL" else "a calibrated colour space"
        raise ImagicError(f"has {what}", "sRGB, or an embedded colour profile", "save it as PNG or JPEG in the program that made it")
    return None


def _of_tiff(tags: Directory) -> ColourSpace | None:
    """By the tags WhitePoint, PrimaryChromaticities and TransferFunction."""
    white, others = tags.numbers(_WHITE_POINT), tags.numbers(_PRIMARIES)
    table = np.array(tags.numbers(_TRANSFER_FUNCTION, _MAX_TABLE)) / 65535
    complete = len(white) == 2 and len(others) == 6
    if not complete and not len(table):
        return None
    primaries = cast(Primaries, (*white, *others)) if complete else SRGB_PRIMARIES
    size = 2 ** min(int(tags.number(_BITS, 1)), 16)
    tables = table.reshape(-1, size) if len(table) in (size, 3 * size) else table[:0].reshape(0, 1)
    if tags.number(_PHOTOMETRIC, 0) == 0:  # white is 0
        tables = tables[:, ::-1]
    return of_chromaticities(primaries, tuple(table_curve(values) for values in tables) or (srgb_curve,))


def _of_exif(tags: Directory) -> ColourSpace | None:
    """Adobe RGB, as cameras state it (DCF): uncalibrated, with the interoperability index R03; or 2, which some write instead."""
    exif = tags.directory(_EXIF)
    adobe_rgb = exif.directory(_INTEROPERABILITY).text(_INTEROPERABILITY_INDEX) == b"R03"
    return ADOBE_RGB if exif.number(_COLOUR_SPACE, 1) == 2 or (adobe_rgb and exif.number(_COLOUR_SPACE, 65535) != 1) else None
