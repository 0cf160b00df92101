"""Every key of docs/reference/photos.md: it changes the picture as that page says, does not change it, or is rejected."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
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
    read_bytes,
    tiff,
    with_property,
)
from PIL import Image
from torture.photos import _chunk, _exif, _png, _segment, _tiff, _with_segments

from imagic_lora.core.errors import ImagicError

PAGE = Path(__file__).parents[2] / "docs/reference/photos.md"
SMOOTH = np.asarray(Image.fromarray(noise(2, 3, 3)).resize((48, 32), Image.Resampling.BICUBIC))
IMAGE = Image.fromarray(SMOOTH)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" crs:Exposure2012="+4.00" photoshop:ICCProfile="Adobe RGB (1998)"/></x:xmpmeta>'
TURNED = np.rot90(SMOOTH, -1)  # upright, where the orientation is 6
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
BOXED = bytes_of(IMAGE, "AVIF", quality=95, icc_profile=SRGB_PROFILE)


def listed(section: str) -> list[str]:
    """The first column of the table of a section."""
    text = PAGE.read_text().split(f"### {section}\n")[1].split("\n###")[0]
    return re.findall(r"^\| (.+?) \|", text, re.MULTILINE)[1:]


def jpeg(segments: bytes = b"", **options: Any) -> bytes:
    return _with_segments(bytes_of(IMAGE, "JPEG", **JPEG, **options), segments)


def _exif_of(orientation: int, tags: dict[int, Any] | None = None) -> bytes:
    return b"Exif\0\0" + _exif(orientation, tags)


def rgba(alpha: int = 51) -> Image.Image:
    image = IMAGE.copy()
    image.putalpha(alpha)
    return image


ON_WHITE = 255 - 0.2 * (255 - SMOOTH.astype(float))
LINEAR = 255 * np.where((c := SMOOTH / 255) <= 0.0031308, 12.92 * c, 1.055 * np.maximum(c, 1e-9) ** (1 / 2.4) - 0.055)
Wanted = list[tuple[Callable[[], bytes], np.ndarray | None]]  # None: not what the pixels say; what exactly is tested in test_colours.py


def _with_box(format: str, kind: bytes, body: bytes) -> Callable[[], bytes]:
    return lambda: with_property(BOXED if format == "AVIF" else heic(SMOOTH, icc_profile=SRGB_PROFILE, icc_profile_type="prof"), kind, body)


def _cropped_heic() -> bytes:
    """The encoder crops what it has padded by a clean aperture of its own."""
    data = heic(SMOOTH)
    at = data.index(b"clap") + 4
    return data[:at] + CROP[:16] + data[at + 16 :]  # with the same middle


def _gif() -> bytes:
    image = Image.fromarray(np.where(SMOOTH[..., 0] > 99, 1, 0).astype(np.uint8))
    image.putpalette([9, 9, 9, 80, 90, 100])
    return bytes_of(image, "GIF", transparency=1)


GIF_PIXELS = np.where(SMOOTH[..., :1] > 99, 255, 9).repeat(3, -1)
GRAY = SMOOTH[..., 0]
CROP = struct.pack(">8I", 24, 1, 16, 1, 0, 1, 0, 1)  # clean aperture of 24 x 16 in the middle
NCLX: dict[str, Any] = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6, "full_range_flag": 1}
HONOURED: dict[str, Wanted] = {
    "ICC profile": [
        (lambda format=format: bytes_of(IMAGE, format, icc_profile=linear_profile()), LINEAR) for format in ("PNG", "JPEG", "TIFF", "WEBP")
    ],
    "PNG cICP": [(lambda: png(SMOOTH, (b"cICP", bytes([12, 13, 0, 1]))), None)],
    "PNG sRGB": [(lambda: png(SMOOTH, (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))), SMOOTH)],
    "PNG gAMA, cHRM": [(lambda: png(SMOOTH, (b"gAMA", struct.pack(">I", 100_000))), LINEAR)],
    "PNG tRNS": [
        (lambda: png(GRAY, (b"tRNS", struct.pack(">H", int(GRAY[0, 0])))), np.where(GRAY[0, 0] == GRAY, 255, GRAY)[..., None].repeat(3, -1))
    ],
    "AVIF, HEIC nclx": [(lambda: avif(SMOOTH, (12, 13)), None), (lambda: heic(SMOOTH, **NCLX), None)],
    "AVIF, HEIC irot, imir": [
        (_with_box("AVIF", b"irot", b"\3"), TURNED),
        (lambda: heic(SMOOTH, exif=_exif_of(6)), TURNED),
        (_with_box("AVIF", b"imir", b"\1"), SMOOTH[:, ::-1]),
        (lambda: heic(SMOOTH, exif=_exif_of(2)), SMOOTH[:, ::-1]),
    ],
    "AVIF, HEIC alpha": [
        (lambda: bytes_of(rgba(), "AVIF", quality=95, subsampling="4:4:4"), ON_WHITE),
        (lambda: bytes_of(rgba(), "AVIF", quality=95, subsampling="4:4:4", alpha_premultiplied=True), ON_WHITE),
        (lambda: heic(np.asarray(rgba()), "RGBA"), ON_WHITE),
        (lambda: heic(np.asarray(rgba().convert("RGBa")), "RGBa"), ON_WHITE),
    ],
    "HEIC clap": [(_cropped_heic, SMOOTH[8:24, 12:36])],
    "EXIF Orientation": [(lambda format=format: bytes_of(IMAGE, format, exif=_exif_of(6)), TURNED) for format in ("PNG", "JPEG", "WEBP")]
    + [(lambda: tiff(SMOOTH, {274: (3, [6])}), TURNED)],
    "EXIF InteroperabilityIndex R03, ColorSpace 2": [
        (lambda: jpeg(exif=b"Exif\0\0" + exif_colours(65535, b"R03")), None),
        (lambda: jpeg(exif=b"Exif\0\0" + exif_colours(2)), None),
    ],
    "XMP tiff:Orientation": [
        (lambda: png(SMOOTH, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), TURNED),
        (lambda: jpeg(xmp=XMP), TURNED),
        (lambda: jpeg(xmp=XMP, exif=_exif_of(1)), SMOOTH),
    ],
    "JPEG Adobe marker": [
        (lambda: jpeg(keep_rgb=True), SMOOTH),
        (
            lambda: bytes_of(Image.merge("CMYK", [*Image.fromarray(255 - SMOOTH).split(), Image.new("L", IMAGE.size)]), "JPEG", **JPEG),
            SMOOTH,
        ),
    ],
    "TIFF layout": [
        (
            lambda: tiff(
                SMOOTH.transpose(2, 0, 1),
                {284: (3, [2]), 256: (4, [48]), 257: (4, [32]), 273: (4, [0, 1536, 3072]), 278: (4, [32]), 279: (4, [1536] * 3)},
            ),
            SMOOTH,
        ),
        (lambda: bytes_of(IMAGE.convert("YCbCr"), "TIFF"), SMOOTH),
        (lambda: bytes_of(IMAGE, "TIFF", big_tiff=True), SMOOTH),
    ],
    "TIFF chromaticities": [(lambda: tiff(SMOOTH, {301: (3, [value * 257 for value in range(256)])}), LINEAR)],
    "BMP version 5 profile": [(lambda: bmp((9, 99, 199, 0), 124, b"DEBM", profile=linear_profile()), None)],
    "BMP alpha": [(lambda: bmp((0, 0, 0, 51), 124, b"BGRs", masks=True), np.full((8, 8, 3), 204.0))],
    "GIF transparency": [(_gif, GIF_PIXELS)],
    "PPM maxval": [(lambda: b"P6 48 32 65535\n" + (SMOOTH.astype(">u2") * 257).tobytes(), SMOOTH)],
}


@each("key", list(HONOURED))
def test_what_is_honoured(key: str, tmp_path: Path) -> None:
    """The picture is what the key makes of it."""
    for make, wanted in HONOURED[key]:
        found = read_bytes(make(), tmp_path).astype(float)
        if wanted is None:
            assert np.abs(found - (SMOOTH if found.shape == SMOOTH.shape else (9, 99, 199))).max() > 5
        else:
            assert found.shape == wanted.shape
            assert np.abs(found - wanted).mean() < 4


PNG_HINTS = {
    b"bKGD": bytes([0, 9, 0, 9, 0, 9]),
    b"sBIT": bytes([5, 5, 5]),
    b"sPLT": b"name\0\x08" + bytes(6),
    b"pHYs": struct.pack(">IIB", 3, 1, 0),
    b"oFFs": struct.pack(">iiB", 5, 5, 0),
    b"sTER": b"\0",
    b"tIME": bytes([7, 230, 1, 1, 1, 1, 1]),
    b"tEXt": b"Comment\0gamma",
    b"zTXt": b"icc:description\0\0" + zlib.compress(b"Display P3"),
}
LIGHT = {b"mDCV": bytes(24), b"cLLI": bytes(8), b"mDCv": bytes(24), b"cLLi": bytes(8)}
IRB = b"Photoshop 3.0\0" + b"8BIM\x04\x0f\0\0" + struct.pack(">I", 4) + b"icc!"
GAIN_MAP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description hdrgm:Version="1.0" hdrgm:GainMapMax="3"/>'
RIGHTS = {37121: (7, [1, 2, 3, 0]), 42240: (5, [10, 22]), 318: (5, [1, 3, 1, 3]), 319: (5, [1, 2] * 6), 301: (3, [0] * 768)}
STATISTICS = {
    280: (3, [50]),
    281: (3, [99]),
    282: (5, [72, 1]),
    283: (5, [300, 1]),
    290: (3, [4]),
    291: (3, [0] * 256),
    340: (3, [9] * 3),
    34377: (7, [1] * 30),
    700: (7, [*b"<x/>"]),
}
Pair = tuple[Callable[[], bytes], Callable[[], bytes]]


def _animated(format: str, **options: Any) -> Pair:
    other = Image.new("RGB", IMAGE.size)
    return lambda: bytes_of(IMAGE, format, save_all=True, append_images=[other, IMAGE], **options), lambda: bytes_of(
        IMAGE, format, **options
    )


def _sequence(count: int) -> bytes:
    return bytes_of(IMAGE, "AVIF", quality=95, save_all=True, append_images=[Image.new("RGB", IMAGE.size)] * (count - 1))


HARMLESS: dict[str, list[Pair]] = {
    "PNG bKGD, sBIT, sPLT, hIST, pHYs, oFFs, sTER, tIME, texts": [(lambda: png(SMOOTH, *PNG_HINTS.items()), lambda: png(SMOOTH))],
    "PNG, AVIF, HEIC light levels": [(lambda: png(SMOOTH, *LIGHT.items()), lambda: png(SMOOTH))]
    + [
        (_with_box(format, kind, bytes(24)), _with_box(format, b"zzzz", b""))
        for format in ("AVIF", "HEIC")
        for kind in (b"clli", b"mdcv", b"amve", b"ndwt")
    ],
    "PNG, WebP, GIF animation": [
        _animated("PNG"),
        _animated("PNG", default_image=True),
        _animated("WEBP", lossless=True),
        _animated("GIF"),
    ],
    "JPEG density, comments, Photoshop, JUMBF": [
        (
            lambda: jpeg(
                _segment(0xE0, b"JFIF\0\1\2\0\0\1\0\3\0\0")
                + _segment(0xFE, b"gamma 1")
                + _segment(0xED, IRB)
                + _segment(0xEB, b"JP\0\1" + bytes(20))
            ),
            jpeg,
        )
    ],
    "JPEG gain maps and further images": [
        (lambda: jpeg(_segment(0xE1, GAIN_MAP)), jpeg),
        (lambda: bytes_of(IMAGE, "MPO", save_all=True, append_images=[Image.new("L", (9, 9))], **JPEG), jpeg),
    ],
    "AVIF, HEIC further images": [
        (lambda: _sequence(3), lambda: _sequence(2)),
        (lambda: heic(SMOOTH, thumbnails=[16]), lambda: heic(SMOOTH)),
    ],
    "AVIF, HEIC pasp": [
        (_with_box(format, b"pasp", struct.pack(">II", 2, 1)), _with_box(format, b"zzzz", b"")) for format in ("AVIF", "HEIC")
    ],
    "AVIF, HEIC EXIF and XMP": [
        (lambda: bytes_of(IMAGE, "AVIF", quality=95, xmp=XMP), lambda: bytes_of(IMAGE, "AVIF", quality=95)),
        (lambda: heic(SMOOTH, exif=exif_colours(65535, b"R03")), lambda: heic(SMOOTH)),
    ],
    "EXIF ColorSpace 1 and 65535": [(lambda space=space: jpeg(exif=b"Exif\0\0" + exif_colours(space)), jpeg) for space in (1, 65535)],
    "EXIF other tags": [(lambda: jpeg(exif=_exif_of(1, RIGHTS)), jpeg)],
    "XMP other properties": [(lambda: jpeg(xmp=XMP.replace(b"Orientation", b"Make")), jpeg)],
    "TIFF resolution, pages, statistics": [(lambda: tiff(SMOOTH, STATISTICS), lambda: tiff(SMOOTH)), _animated("TIFF")],
    "BMP intent, resolution, sRGB": [
        (lambda space=space: bmp((9, 99, 199, 0), 124, space), lambda: bytes_of(Image.new("RGB", (8, 8), (9, 99, 199)), "BMP"))
        for space in (b"BGRs", b" niW", b"")
    ],
    "PFM scale": [
        (
            lambda: b"Pf\n48 32\n-7.5\n" + (GRAY.astype("<f4") / 255).tobytes(),
            lambda: b"Pf\n48 32\n-1.0\n" + (GRAY.astype("<f4") / 255).tobytes(),
        )
    ],
}


@each("key", list(HARMLESS))
def test_what_is_harmless(key: str, tmp_path: Path) -> None:
    """The picture is the same without it."""
    for make, without in HARMLESS[key]:
        data, plain = make(), without()
        assert data != plain
        assert np.array_equal(read_bytes(data, tmp_path), read_bytes(plain, tmp_path))


def _floats(*values: float, mode: Any = np.float32) -> bytes:
    """Mostly the first value, one pixel of the second."""
    pixels = np.full((9, 99), values[0], mode)
    pixels[0, 0] = values[1]
    return bytes_of(Image.fromarray(pixels), "TIFF")


DEEP = (SMOOTH.astype("<u2") * 257).tobytes()
FLOATS = (SMOOTH / 255).astype("<f4").tobytes()
TWELVE = jpeg()[: jpeg().index(b"\xff\xc0") + 4] + b"\x0c" + jpeg()[jpeg().index(b"\xff\xc0") + 5 :]
CMYK = {258: (3, [8] * 4), 262: (3, [5]), 277: (3, [4])}
LINKED = "a colour profile in another file"
REJECTED: dict[str, list[tuple[Callable[[], bytes], str]]] = {
    "code points that are reserved or rare": [
        (lambda code=code: png(SMOOTH, (b"cICP", bytes([1, code, 0, 1]))), f"transfer characteristics {code} of ITU-T H.273")
        for code in (0, 3, 7, 9, 10, 11, 12, 17, 19, 255)
    ]
    + [(lambda: avif(SMOOTH, (23, 13)), "colour primaries 23 of ITU-T H.273")],
    "PNG cICP with a matrix": [(lambda: png(SMOOTH, (b"cICP", bytes([9, 16, 9, 0]))), "the chunk cICP")],
    "PNG CgBI": [(lambda: png(SMOOTH)[:8] + _chunk(b"CgBI", bytes(4)) + png(SMOOTH)[8:], "variant of iOS apps")],
    "PNG tRNS of 16-bit colours": [(lambda: _png(1, 1, 16, 2, [bytes(6)], _chunk(b"tRNS", bytes(6))), "transparent colour of 16 bits")],
    "PNG text icc_profile, transparency": [
        (lambda key=key: png(SMOOTH, (b"tEXt", key + b"\0x")), f"a text with the keyword {key.decode()}")
        for key in (b"icc_profile", b"transparency")
    ],
    "JPEG of 12 bits": [(lambda: TWELVE, "cannot handle 12-bit layers")],
    "GIF colour profile": [
        (lambda: _gif().replace(b",\0\0\0\0", b"!\xff\x0bICCRGBG1012\1\0\0,\0\0\0\0", 1), "a GIF with a colour profile")
    ],
    "BMP linked profile, calibrated space": [
        (lambda: bmp((1, 2, 3, 0), 124, b"KNIL", profile=b"c:\\p.icc"), LINKED),
        (lambda: bmp((1, 2, 3, 0), 108, ends=struct.pack("<12i", *[2**28] * 12)), "a calibrated colour space"),
    ],
    "AVIF clap": [(_with_box("AVIF", b"clap", CROP), "cropped by its clean aperture")],
    "TIFF preview, mask": [
        (lambda: tiff(SMOOTH, {254: (4, [1])}), "holds only a preview"),
        (lambda: tiff(SMOOTH, {254: (4, [4])}), "a transparency mask"),
    ],
    "TIFF inks, ranges, indices": [
        (lambda: _tiff(2, 2, CMYK | {332: (3, [2])}, bytes(16)), "inks other than CMYK"),
        (lambda: _tiff(2, 2, CMYK | {336: (3, [16, 235])}, bytes(16)), "inks of a limited range"),
        (lambda: tiff(SMOOTH, {346: (3, [1])}), "indexed or scaled"),
        (lambda: tiff(SMOOTH, {433: (5, [1, 1])}), "indexed or scaled"),
        (lambda: _tiff(2, 2, {258: (3, [8]), 262: (3, [1]), 339: (3, [2])}, bytes(4)), "signed values"),
    ],
    "TIFF pixels of other kinds": [
        (
            lambda: tiff(np.frombuffer(FLOATS, np.uint8).reshape(32, -1, 3), {256: (4, [48]), 258: (3, [32] * 3), 339: (3, [3] * 3)}),
            "pixels of 3 floating-point numbers of 32 bits",
        ),
        (
            lambda: tiff(np.frombuffer(DEEP, np.uint8).reshape(32, -1, 3), {256: (4, [48]), 258: (3, [16] * 3), 262: (3, [8])}),
            "pixels of 3 whole numbers of 16 bits, photometric interpretation 8",
        ),
        (lambda: tiff(SMOOTH, {259: (3, [34887])}), "compressed by the method 34887"),
    ],
    "transparency everywhere": [
        (lambda format=format: bytes_of(rgba(0), format), "fully transparent") for format in ("PNG", "WEBP", "TIFF")
    ]
    + [(lambda: png(np.full((2, 2), 7, np.uint8), (b"tRNS", b"\0\7")), "fully transparent")],
    "values of an unknown range": [
        (lambda: _floats(0.5, 12.5), "has values from 0.5 to 12.5 of an unknown range"),
        (lambda: _floats(0.2, 100), "unknown range"),
        (lambda: _floats(2000, 4095, mode=np.int32), "unknown range"),
        (lambda: _floats(0.5, -7), "unknown range"),
    ],
    "other formats": [
        (lambda head=head: head + bytes(40), name)
        for head, name in {
            b"\xff\x0a": "is a JPEG XL image",
            b"\0\0\0\x0cJXL \r\n\x87\n": "is a JPEG XL image",
            b"\0\0\0\x0cjP  \r\n\x87\n": "is a JPEG 2000 image",
            b"v/1\1": "is an OpenEXR image",
            b"#?RADIANCE\n": "is a Radiance HDR image",
            b"PF\n1 1\n-1\n": "is a PFM image",
            b"FUJIFILMCCD-RAW": "is a camera raw file",
            b"\0\0\0\x18ftypcrx \0\0\0\1crx isom": "is a camera raw file",
            b"8BPS": "is a Photoshop document",
            b"%PDF-1.7": "is a PDF document",
            b"<svg ": "is an SVG drawing",
            b"\0\0\0\x14ftypqt  \0\0\0\0qt  ": "is a video",
        }.items()
    ],
}


@each("key", list(REJECTED))
def test_what_is_rejected(key: str, tmp_path: Path) -> None:
    """By name."""
    for make, words in REJECTED[key]:
        with pytest.raises(ImagicError, match=words):
            read_bytes(make(), tmp_path)


@each("section, cases", [("Honoured", HONOURED), ("Harmless", HARMLESS), ("Rejected", REJECTED)])
def test_the_page_lists_what_is_tested(section: str, cases: dict[str, Any]) -> None:
    """And nothing else."""
    assert listed(section) == list(cases)
