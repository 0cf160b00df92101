"""The colours that a file declares, against closed forms in float64."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import each
from photos.building import (
    SRGB_PROFILE,
    avif,
    bmp,
    bytes_of,
    exif_colours,
    heic,
    linear_profile,
    noise,
    png,
    profile_with_cicp,
    read_bytes,
    tiff,
    tiff_of_exif,
)
from PIL import Image, features
from torture.photos import _chunk, _png, _segment

from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.colour import conversion
from imagic_lora.photos.colour.hdr import eetf

# RGB to XYZ of D65, rounded from those of CSS Color 4
SRGB = np.array([[0.4123908, 0.3575843, 0.1804808], [0.2126390, 0.7151687, 0.0721923], [0.0193308, 0.1191948, 0.9505322]])
P3 = np.array([[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0, 0.0451134, 1.0439444]])
BT2020 = np.array([[0.6369580, 0.1446169, 0.1688810], [0.2627002, 0.6779981, 0.0593017], [0, 0.0280727, 1.0609851]])
ADOBE = np.array([[0.5766690, 0.1855582, 0.1882286], [0.2973450, 0.6273636, 0.0752915], [0.0270314, 0.0706889, 0.9913375]])
PIXEL = (200, 60, 50)
COLOURS = np.array([PIXEL, (60, 120, 40), (90, 90, 90), (70, 80, 190)])
S, A = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06), (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def light(values: Any) -> np.ndarray:
    """Linear light of sRGB values in [0, 255]."""
    c = np.asarray(values) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def curve(linear: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 255] of light in [0, 1]."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def pq(nits: np.ndarray) -> np.ndarray:
    """The inverse EOTF of BT.2100 PQ, as a value in [0, 255]."""
    y = (nits / 10000) ** 0.1593017578125
    return 255 * ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """The inverse OOTF of a display of 1000 cd/m2 and the OETF of BT.2100 HLG, as a value in [0, 255]."""
    luminance = (nits @ np.array([0.2627, 0.6780, 0.0593]))[..., None] / 1000
    scene = nits / 1000 * luminance ** ((1 - 1.2) / 1.2)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return 255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


ENCODINGS = {  # of sRGB values: code points, and values in [0, 255]
    "Display P3": ((12, 13), lambda c: curve(light(c) @ np.linalg.solve(P3, SRGB).T)),
    "BT.2020": ((9, 14), lambda c: curve(light(c) @ np.linalg.solve(BT2020, SRGB).T)),
    "BT.709": ((1, 1), lambda c: np.asarray(c, float)),
    "unspecified": ((2, 2), lambda c: np.asarray(c, float)),
    "linear": ((1, 8), lambda c: 255 * light(c)),
    "power of 2.2": ((1, 4), lambda c: 255 * light(c) ** (1 / 2.2)),
    "HDR10": ((9, 16), lambda c: pq(203 * light(c) @ np.linalg.solve(BT2020, SRGB).T)),
    "HLG": ((9, 18), lambda c: hlg(203 * light(c) @ np.linalg.solve(BT2020, SRGB).T)),
    "P3 in PQ": ((12, 16), lambda c: pq(203 * light(c) @ np.linalg.solve(P3, SRGB).T)),
}


def whole(values: np.ndarray) -> np.ndarray:
    """Colours as blocks of 16 x 16 pixels, which lossy coding keeps."""
    return np.repeat(np.repeat(values.round().astype(np.uint8)[None], 16, 0), 16, 1)


def blocks(pixels: np.ndarray) -> np.ndarray:
    """The colour in the middle of each block."""
    return pixels[8, 8::16].astype(float)


@each("name", list(ENCODINGS))
def test_code_points_are_converted(name: str, tmp_path: Path) -> None:
    """In PNG, AVIF and HEIC; HDR whose light is below the reference white comes back as it was, to 8 bits of PQ or HLG."""
    (primaries, transfer), encode = ENCODINGS[name]
    stored = whole(encode(COLOURS))
    far = 6 if transfer >= 16 else 2
    found = blocks(read_bytes(png(stored, (b"cICP", bytes([primaries, transfer, 0, 1]))), tmp_path))
    np.testing.assert_allclose(found, COLOURS, atol=far)
    if features.check("avif"):
        np.testing.assert_allclose(blocks(read_bytes(avif(stored, (primaries, transfer)), tmp_path)), COLOURS, atol=2 * far + 2)
    options = {"color_primaries": primaries, "transfer_characteristics": transfer, "matrix_coefficients": 6, "full_range_flag": 1}
    np.testing.assert_allclose(blocks(read_bytes(heic(stored, **options), tmp_path)), COLOURS, atol=2 * far + 2)


@each("name", ["Display P3", "HDR10"])
def test_a_narrow_range_is_scaled(name: str, tmp_path: Path) -> None:
    """Black is 16, white is 235."""
    (primaries, transfer), encode = ENCODINGS[name]
    stored = whole(16 + encode(COLOURS) * 219 / 255)
    found = blocks(read_bytes(png(stored, (b"cICP", bytes([primaries, transfer, 0, 0]))), tmp_path))
    np.testing.assert_allclose(found, COLOURS, atol=7)


def test_the_white_of_another_white_point_stays_white(tmp_path: Path) -> None:
    """DCI-P3 is adapted to the white of sRGB."""
    grays = np.array([(0, 0, 0), (255, 255, 255), (128, 128, 128)])
    found = blocks(read_bytes(png(whole(grays), (b"cICP", bytes([11, 13, 0, 1]))), tmp_path))
    np.testing.assert_allclose(found, grays, atol=1)


UNSUPPORTED = {
    "primaries": (bytes([3, 13, 0, 1]), "colour primaries 3 of ITU-T H.273"),
    "transfer": (bytes([1, 9, 0, 1]), "transfer characteristics 9 of ITU-T H.273"),
    "matrix": (bytes([1, 13, 1, 1]), r"chunk cICP \[1, 13, 1, 1\]"),
    "short": (bytes([1, 13, 0]), r"chunk cICP \[1, 13, 0\]"),
}


@each("name", list(UNSUPPORTED))
def test_code_points_that_are_not_supported_are_rejected(name: str, tmp_path: Path) -> None:
    """By their number."""
    cicp, words = UNSUPPORTED[name]
    with pytest.raises(ImagicError, match=words):
        read_bytes(png(noise(3, 3, 3), (b"cICP", cicp)), tmp_path)


def chrm(numbers: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(number * 100_000) for number in numbers))


def gama(number: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(number * 100_000))


def iccp(profile: bytes, name: bytes = b"name") -> tuple[bytes, bytes]:
    return b"iCCP", name + b"\0\0" + zlib.compress(profile)


def adobe(values: Any, exponent: float = 563 / 256) -> np.ndarray:
    """sRGB values of Adobe RGB values, or of values in its primaries by another power."""
    return curve((np.asarray(values) / 255) ** exponent @ np.linalg.solve(SRGB, ADOBE).T)


P3_OF_PIXEL = curve(light(PIXEL) @ np.linalg.solve(SRGB, P3).T)
CHUNKS = {
    "the power of sRGB": ([gama(0.45455)], PIXEL),
    "the power and primaries of sRGB": ([gama(0.45455), chrm(S)], PIXEL),
    "linear": ([gama(1)], curve(np.array(PIXEL) / 255)),
    "an old Mac": ([gama(1 / 1.8)], curve((np.array(PIXEL) / 255) ** 1.8)),
    "Adobe RGB": ([gama(256 / 563), chrm(A)], adobe(PIXEL)),
    "primaries alone": ([chrm(A)], curve(light(PIXEL) @ np.linalg.solve(SRGB, ADOBE).T)),
    "no power": ([gama(0)], PIXEL),
    "primaries that are none": ([chrm((0,) * 8), gama(1)], curve(np.array(PIXEL) / 255)),
    "sRGB before a power": ([(b"sRGB", b"\0"), gama(1), chrm(A)], PIXEL),
    "a profile before sRGB": ([iccp(linear_profile()), (b"sRGB", b"\0")], curve(np.array(PIXEL) / 255)),
    "code points before a profile": ([(b"cICP", bytes([12, 13, 0, 1])), iccp(SRGB_PROFILE), (b"sRGB", b"\0")], P3_OF_PIXEL),
    "sRGB before EXIF": ([(b"sRGB", b"\0"), (b"eXIf", exif_colours(65535, b"R03"))], PIXEL),
}


@each("name", list(CHUNKS))
def test_the_chunks_of_a_png_count_in_the_order_of_its_specification(name: str, tmp_path: Path) -> None:
    """The third edition: cICP, iCCP, sRGB, then gAMA and cHRM."""
    chunks, expected = CHUNKS[name]
    found = read_bytes(png(np.full((2, 2, 3), PIXEL, np.uint8), *chunks), tmp_path)[0, 0]
    np.testing.assert_allclose(found, expected, atol=1)


def test_a_power_counts_for_gray_of_8_and_16_bits(tmp_path: Path) -> None:
    """And for a palette."""
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = curve(gray / 255)
    np.testing.assert_allclose(read_bytes(png(gray, gama(1)), tmp_path)[..., 0], expected, atol=1)
    deep = _png(16, 16, 16, 0, [(row.astype(">u2") * 257).tobytes() for row in gray], _chunk(*gama(1)))
    np.testing.assert_allclose(read_bytes(deep, tmp_path)[..., 0], expected, atol=1)
    data = bytes_of(Image.fromarray(gray).convert("P"), "PNG")
    np.testing.assert_allclose(read_bytes(data[:33] + _chunk(*gama(1)) + data[33:], tmp_path)[..., 0], expected, atol=1)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_the_profile_of_an_avif_counts_before_its_code_points(tmp_path: Path) -> None:
    """As MIAF has it."""
    stored = whole(np.array([(55, 55, 55)]))
    found = read_bytes(avif(stored, (12, 16), icc_profile=linear_profile()), tmp_path)
    np.testing.assert_allclose(blocks(found)[0], curve(np.full(3, 55) / 255), atol=4)


EXIF = {
    "Adobe RGB of cameras": (65535, b"R03", True),
    "Adobe RGB of others": (2, b"", True),
    "sRGB": (1, b"R98", False),
    "a contradiction": (1, b"R03", False),
    "unknown": (65535, b"R98", False),
    "nothing": (65535, b"", False),
}


@each("name", list(EXIF))
@each("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_adobe_rgb_by_exif_is_converted(name: str, format: str, tmp_path: Path) -> None:
    """As cameras state it, without a profile; a profile counts more."""
    colour_space, index, converted = EXIF[name]
    pixels = whole(np.array([PIXEL]))
    options: dict[str, Any] = {"exif": b"Exif\0\0" + exif_colours(colour_space, index)}
    options |= {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    image = Image.fromarray(pixels)
    data = tiff_of_exif(pixels, colour_space, index) if format == "TIFF" else bytes_of(image, format, **options)
    np.testing.assert_allclose(blocks(read_bytes(data, tmp_path))[0], adobe(PIXEL) if converted else PIXEL, atol=3)
    if format != "TIFF":
        found = read_bytes(bytes_of(image, format, **options, icc_profile=SRGB_PROFILE), tmp_path)
        np.testing.assert_allclose(blocks(found)[0], PIXEL, atol=3)


TRANSFER = [round(65535 * (value / 255) ** 1.8) for value in range(256)]
CHROMATICITIES: dict[int, Any] = {
    318: (5, [3127, 10000, 3290, 10000]),
    319: (5, [64, 100, 33, 100, 21, 100, 71, 100, 15, 100, 6, 100]),
}
TIFFS = {
    "chromaticities": (CHROMATICITIES, curve(light(PIXEL) @ np.linalg.solve(SRGB, ADOBE).T)),
    "a white point alone": ({318: CHROMATICITIES[318]}, PIXEL),
    "a transfer function": ({301: (3, TRANSFER)}, curve((np.array(PIXEL) / 255) ** 1.8)),
    "three, and chromaticities": (CHROMATICITIES | {301: (3, TRANSFER * 3)}, adobe(PIXEL, 1.8)),
    "a transfer function of another size": ({301: (3, TRANSFER[:99])}, PIXEL),
}


@each("name", list(TIFFS))
def test_chromaticities_of_a_tiff_are_converted(name: str, tmp_path: Path) -> None:
    """Its tags WhitePoint, PrimaryChromaticities and TransferFunction."""
    tags, expected = TIFFS[name]
    np.testing.assert_allclose(read_bytes(tiff(np.full((2, 2, 3), PIXEL, np.uint8), tags), tmp_path)[0, 0], expected, atol=1)


def test_a_transfer_function_counts_from_white_where_white_is_zero(tmp_path: Path) -> None:
    """The table is for the stored values."""
    gray, tags = noise(5, 5), {258: (3, [8]), 262: (3, [0]), 277: (3, [1]), 301: (3, TRANSFER[::-1])}
    np.testing.assert_allclose(read_bytes(tiff(255 - gray, tags), tmp_path)[..., 0], curve((gray / 255) ** 1.8), atol=1)


def calibrated(red: float, green: float, blue: float, gamma: float) -> bytes:
    """Endpoints with these x, in two-digit chromaticities of sRGB or Adobe RGB otherwise."""
    ends = {0.64: 0.33, 0.30: 0.60, 0.21: 0.71, 0.15: 0.06}
    numbers = [number for x in (red, green, blue) for number in (x, ends[x], 1 - x - ends[x])]
    return struct.pack("<9i3I", *(round(number * 2**30) for number in numbers), *[round(gamma * 65536)] * 3)


BMPS = {
    "sRGB": (bmp((*PIXEL, 0), 108, b"BGRs"), PIXEL),
    "Windows": (bmp((*PIXEL, 0), 124, b" niW"), PIXEL),
    "calibrated, empty": (bmp((*PIXEL, 0), 108), PIXEL),
    "calibrated sRGB": (bmp((*PIXEL, 0), 108, ends=calibrated(0.64, 0.30, 0.15, 2.2)), PIXEL),
    "calibrated sRGB, encoding": (bmp((*PIXEL, 0), 108, ends=calibrated(0.64, 0.30, 0.15, 1 / 2.2)), PIXEL),
    "embedded": (bmp((*PIXEL, 0), 124, b"DEBM", profile=linear_profile()), curve(np.array(PIXEL) / 255)),
    "alpha": (bmp((*PIXEL, 51), 124, b"BGRs", masks=True), 255 - 0.2 * (255 - np.array(PIXEL))),
    "no alpha": (bmp((*PIXEL, 0), 124, b"BGRs", masks=True), PIXEL),
}


@each("name", list(BMPS))
def test_the_colour_space_of_a_bmp(name: str, tmp_path: Path) -> None:
    """By its header; alpha that is 0 everywhere is none, as browsers have it."""
    data, expected = BMPS[name]
    np.testing.assert_allclose(read_bytes(data, tmp_path)[0, 0], expected, atol=1)


@each("gray", [np.uint8, np.uint16])
def test_a_gray_picture_is_converted_by_an_rgb_profile(gray: type, tmp_path: Path) -> None:
    """As browsers do: programs keep the profile when they drop the colours."""
    image = Image.fromarray(np.full((3, 3), 55 * (257 if gray is np.uint16 else 1), gray))
    np.testing.assert_allclose(
        read_bytes(bytes_of(image, "PNG", icc_profile=linear_profile()), tmp_path), curve(np.full((3, 3, 3), 55 / 255)), atol=1
    )


def test_a_profile_behind_the_frame_of_a_jpeg_is_converted(tmp_path: Path) -> None:
    """Its segments may come anywhere before the scan."""
    jpeg = bytes_of(Image.new("RGB", (16, 16), (55, 55, 55)), "JPEG", quality=100)
    end = jpeg.index(b"\xff\xc0") + 2
    end += int.from_bytes(jpeg[end : end + 2], "big")
    profile = linear_profile()
    parts = [_segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + part) for number, part in ((2, profile[300:]), (1, profile[:300]))]
    np.testing.assert_allclose(
        read_bytes(jpeg[:end] + b"".join(parts) + jpeg[end:], tmp_path), curve(np.full((16, 16, 3), 55 / 255)), atol=2
    )


@each("format", ["PNG", "JPEG"])
def test_a_profile_that_states_hdr_by_code_points_is_tone_mapped(format: str, tmp_path: Path) -> None:
    """Its tag cicp; for PNG also by the name that the W3C gave to PQ."""
    stored = Image.fromarray(whole(ENCODINGS["HDR10"][1](COLOURS)))
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    data = bytes_of(stored, format, icc_profile=profile_with_cicp(9, 16), **options)
    np.testing.assert_allclose(blocks(read_bytes(data, tmp_path)), COLOURS, atol=8)
    named = png(np.asarray(stored), iccp(SRGB_PROFILE, b"ITUR_2100_PQ_FULL"))
    np.testing.assert_allclose(blocks(read_bytes(named, tmp_path)), COLOURS, atol=6)


@each("transfer, encode", [(16, pq), (18, hlg)])
def test_highlights_are_rolled_off(transfer: int, encode: Any, tmp_path: Path) -> None:
    """With a peak of 1000 cd/m2 light below the knee stays, the reference white is a little below white, the peak is white; hues stay."""
    nits = np.array([[20.0] * 3, [203.0] * 3, [400.0] * 3, [1000.0] * 3, [800.0, 400.0, 400.0]])
    found = blocks(read_bytes(png(whole(encode(nits)), (b"cICP", bytes([1, transfer, 0, 1]))), tmp_path))
    np.testing.assert_allclose(found[0], curve(np.full(3, 20 / 203)), atol=3)
    np.testing.assert_allclose(found[1], 229, atol=3)  # 157.6 cd/m2, by the Hermite spline of BT.2390 worked out by hand
    assert 229 < found[2, 0] < 255
    np.testing.assert_allclose(found[3], 255, atol=1)
    linear = light(found[4])
    np.testing.assert_allclose(linear[1:] / linear[0], 0.5, atol=0.04)


def test_the_eetf_is_that_of_the_report() -> None:
    """It rises, is the identity up to the knee, and ends at the target with a slope of zero, in PQ."""
    peak, nits = 1000.0, np.geomspace(0.01, 1000, 400)
    mapped = eetf(nits, peak)
    knee = (1.5 * pq(np.array(203.0)) / pq(np.array(peak)) - 0.5) * pq(np.array(peak))
    below = pq(nits) < knee
    assert below.any()
    np.testing.assert_allclose(mapped[below], nits[below], rtol=1e-6)
    assert (np.diff(mapped) > 0).all()
    np.testing.assert_allclose(mapped[-1], 203, rtol=1e-6)
    assert np.diff(pq(mapped))[-1] < 0.02 * np.diff(pq(nits))[-1]


def test_hdr_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is that of the whole picture."""
    data = png(noise(30, 40, 3), (b"cICP", bytes([9, 16, 0, 1])))
    whole_picture = read_bytes(data, tmp_path)
    monkeypatch.setattr(conversion, "TILE_PIXELS", 70)
    assert np.array_equal(read_bytes(data, tmp_path), whole_picture)


def test_hdr_of_one_black_pixel(tmp_path: Path) -> None:
    """No light has no hue."""
    for transfer in (16, 18):
        assert not read_bytes(png(np.zeros((1, 1, 3), np.uint8), (b"cICP", bytes([9, transfer, 0, 1]))), tmp_path).any()
