"""Colour spaces stated by code points (ITU-T H.273) or by chromaticities, and ICC profiles made of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core.errors import ImagicError

Curve = Callable[[np.ndarray], np.ndarray]
Primaries = tuple[float, float, float, float, float, float, float, float]

_D65, _C, _DCI_WHITE = (0.3127, 0.3290), (0.310, 0.316), (0.314, 0.351)
_D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ, as ICC rounds it
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
_BT601_525 = (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)
_PRIMARIES: dict[int, Primaries] = {  # H.273, table 2
    1: (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060),
    4: (*_C, 0.670, 0.330, 0.210, 0.710, 0.140, 0.080),
    5: (*_D65, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: _BT601_525,
    7: _BT601_525,
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    10: (1 / 3, 1 / 3, 1, 0, 0, 1, 0, 0),
    11: (*_DCI_WHITE, *_P3),
    12: (*_D65, *_P3),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
SRGB_PRIMARIES = _PRIMARIES[1]
_UNSPECIFIED = 2
_EXPECTED = "sRGB, Display P3, Adobe RGB, BT.2020, PQ or HLG"
_REMEDY = "convert it to sRGB in an image editor"
_CURVE_POINTS = 255 * 16 + 1  # includes every value of 8 bits


def srgb_curve(values: np.ndarray) -> np.ndarray:
    """Light in [0, 1] of sRGB values in [0, 1] (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_values(light: np.ndarray) -> np.ndarray:
    """The inverse of :func:`srgb_curve`."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def power_curve(exponent: float) -> Curve:
    """Light as a power of the value."""
    return lambda values: values**exponent


def table_curve(light: np.ndarray) -> Curve:
    """Light by linear interpolation in a table for evenly spaced values."""
    return lambda values: np.interp(values, np.linspace(0, 1, len(light)), light)


# The curve by which BT.601, BT.709 and BT.2020 encode is that of a camera. For images these code points stand for sRGB: so Chrome and
# Firefox read them, and so they are written.
_CURVES: dict[int, Curve] = dict.fromkeys((1, 6, 13, 14, 15, _UNSPECIFIED), srgb_curve)
_CURVES |= {4: power_curve(2.2), 5: power_curve(2.8), 8: power_curve(1)}
_HDR: dict[int, Literal["PQ", "HLG"]] = {16: "PQ", 18: "HLG"}


@dataclass(frozen=True)
class ColourSpace:
    """An RGB colour space.

    Args:
        primaries: CIE 1931 chromaticities x, y of white, red, green and blue.
        curves: from values in [0, 1] to light in [0, 1]: one for all channels, or three.
        hdr: the transfer function of BT.2100 that replaces the curves; None for standard dynamic range.
        full_range: black is 0 and white is 1; False if black is 16/255 and white 235/255.
    """

    primaries: Primaries = SRGB_PRIMARIES
    curves: tuple[Curve, ...] = (srgb_curve,)
    hdr: Literal["PQ", "HLG"] | None = None
    full_range: bool = True

    @property
    def is_srgb(self) -> bool:
        """Whether this is sRGB, with primaries to three digits."""
        near = np.allclose(self.primaries, SRGB_PRIMARIES, rtol=0, atol=1.5e-3)
        return near and self.curves == (srgb_curve,) and self.hdr is None and self.full_range

    def signal(self, values: np.ndarray) -> np.ndarray:
        """Scales values of the stated range to [0, 1], clipped."""
        return values if self.full_range else ((255 * values - 16) / 219).clip(0, 1)


SRGB = ColourSpace()
ADOBE_RGB = ColourSpace((*_D65, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060), (power_curve(563 / 256),))


def of_code_points(primaries: int, transfer: int, full_range: bool = True) -> ColourSpace:
    """The colour space of two code points of ITU-T H.273. Unspecified ones are those of sRGB.

    Raises:
        ImagicError: a code point is reserved, or is not supported.
    """
    if primaries != _UNSPECIFIED and primaries not in _PRIMARIES:
        raise ImagicError(f"states the colour primaries {primaries} of ITU-T H.273, which are not supported", _EXPECTED, _REMEDY)
    if transfer not in _CURVES and transfer not in _HDR:
        raise ImagicError(f"states the transfer characteristics {transfer} of ITU-T H.273, which are not supported", _EXPECTED, _REMEDY)
    curves = (_CURVES.get(transfer, srgb_curve),)
    return ColourSpace(_PRIMARIES.get(primaries, SRGB_PRIMARIES), curves, _HDR.get(transfer), full_range)


def of_chromaticities(primaries: Primaries, curves: tuple[Curve, ...]) -> ColourSpace | None:
    """The colour space of chromaticities that a file states; None if they form no triangle around the white, as viewers ignore them."""
    try:
        light = _amounts(primaries)
    except np.linalg.LinAlgError:
        return None
    return ColourSpace(primaries, curves) if np.isfinite(light).all() and light.min() > 0 else None


def _xyz(primaries: Primaries) -> list[np.ndarray]:
    """XYZ, with a sum of 1, of white, red, green and blue."""
    return [np.array([x, y, 1 - x - y]) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]


def _amounts(primaries: Primaries) -> np.ndarray:
    """How much of each primary makes a white of luminance 1: ``[3]``."""
    white, *columns = _xyz(primaries)
    with np.errstate(all="ignore"):
        return np.linalg.solve(np.column_stack(columns), white / white[1])


def luminance(primaries: Primaries) -> np.ndarray:
    """The luminance of each primary: ``[3]``; sums to 1."""
    return np.array(primaries[3::2]) * _amounts(primaries)


def to_xyz(primaries: Primaries) -> np.ndarray:
    """The matrix from linear RGB to XYZ, adapted to the white D50 by Bradford's method as ICC does: ``[3, 3]``."""
    white, *columns = _xyz(primaries)
    matrix = np.column_stack(columns) * _amounts(primaries)
    gain = (_BRADFORD @ _D50) / (_BRADFORD @ (white / white[1]))
    return np.linalg.solve(_BRADFORD, gain[:, None] * (_BRADFORD @ matrix))


def icc_profile(space: ColourSpace) -> bytes:
    """The ICC profile, version 4, of a colour space of standard dynamic range: three primaries and their curves."""
    values = space.signal(np.linspace(0, 1, _CURVE_POINTS))
    curves = [_curv(curve(values)) for curve in space.curves * (1 if len(space.curves) == 3 else 3)]
    columns = [_xyz_tag(column) for column in to_xyz(space.primaries).T]
    tags = dict(zip((b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"), [_xyz_tag(_D50), *columns, *curves], strict=True))
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 4 << 24, b"mntr", b"RGB ", b"XYZ ", b"acsp") + _xyz_tag(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz_tag(xyz: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in xyz.tolist()))


def _curv(light: np.ndarray) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", len(light)) + (light.clip(0, 1) * 65535).round().astype(">u2").tobytes()
