"""A photo in, a canvas, a PNG out: against Pillow, NumPy and closed forms."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import each
from photos.building import SRGB_PROFILE, bytes_of, heic, linear_profile, noise, read_bytes
from PIL import Image, ImageCms, PngImagePlugin, features
from torture.photos import _chunk, _directory, _endless, _exif, _of_inks, _of_lightness, _png, _scans, _segment, _tiff, _with_segments

from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import to_canvas, to_image, to_pixels
from imagic_lora.photos.colour import conversion
from imagic_lora.photos.files import opening
from imagic_lora.photos.png import write_png
from imagic_lora.photos.reading import read_metadata, read_photo
from imagic_lora.photos.sheet import sheet

ORIENTATION = 0x0112
SIZES = [(64, 64), (50, 40), (1, 1), (1, 300), (3000, 7), (640, 427), (37, 91)]
CANVASES = [(64, 8), (64, 64), (100, 16), (512, 8)]


def read(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    """The pixels of an image that went through a file and :func:`read_photo`."""
    image.save(path, **options)
    return np.asarray(read_photo(path).image)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composited on white in float64."""
    opacity = alpha[..., None].astype(np.float64) / 255
    return opacity * colour + (1 - opacity) * 255


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + _chunk(b"IDAT")


def gray_profile() -> bytes:
    """Gray whose light goes with the square of the value."""
    from torture.photos import _profile

    return _profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0\0\0\0\1\2\0"}, version=2)


@each("suffix", ["png", "bmp", "tiff", "ppm"])
def test_an_rgb_picture_is_read_as_it_is(suffix: str, tmp_path: Path) -> None:
    """Lossless formats give back the very pixels."""
    pixels = noise(9, 13, 3)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / f"photo.{suffix}"), pixels)


def test_the_first_picture_of_an_mpo_is_read(tmp_path: Path) -> None:
    """A phone's JPEG that holds several pictures is read as Pillow reads its first."""
    first, second = (Image.fromarray(noise(16, 24, 3, seed=seed)) for seed in (0, 1))
    found = read(first, tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "phone.jpg") as several:
        assert several.format == "MPO"
        assert np.array_equal(found, np.asarray(several))


def test_the_sha256_is_of_the_file(tmp_path: Path) -> None:
    """The digest is of the bytes on disk, not of the pixels."""
    path = tmp_path / "photo.png"
    Image.fromarray(noise(4, 4, 3)).save(path)
    assert read_photo(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_grayscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    """A gray picture is repeated over red, green and blue."""
    gray = noise(9, 13)
    assert np.array_equal(read(Image.fromarray(gray), tmp_path / "gray.png"), np.stack([gray] * 3, axis=-1))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    """Bits come in as 0 and 255."""
    bits = noise(9, 13) > 127
    assert np.array_equal(read(Image.fromarray(bits), tmp_path / "bits.png"), np.stack([bits * 255] * 3, axis=-1))


def test_rgba_is_composited_on_white(tmp_path: Path) -> None:
    """Every opacity mixes with white, to a rounding."""
    rgba = noise(16, 16, 4)
    rgba[:, :, 3] = np.arange(256).reshape(16, 16)
    np.testing.assert_allclose(read(Image.fromarray(rgba), tmp_path / "rgba.png"), on_white(rgba[..., :3], rgba[..., 3]), atol=1)


def test_gray_with_alpha_is_composited_on_white(tmp_path: Path) -> None:
    """LA mixes with white too."""
    la = noise(16, 16, 2)
    found = read(Image.fromarray(la), tmp_path / "la.png")
    np.testing.assert_allclose(found, on_white(np.repeat(la[..., :1], 3, axis=-1), la[..., 1]), atol=1)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    """Mode P gives the colours of its palette."""
    palette, indices = noise(256, 3), noise(9, 13, seed=1)
    image = Image.frombytes("P", (13, 9), indices.tobytes())
    image.putpalette(palette.tobytes())
    assert np.array_equal(read(image, tmp_path / "palette.png"), palette[indices])


def test_a_palette_with_transparency_is_composited_on_white(tmp_path: Path) -> None:
    """Each entry of a palette has its own opacity."""
    palette, indices, alpha = noise(256, 3), noise(9, 13, seed=1), noise(256, seed=2)
    image = Image.frombytes("P", (13, 9), indices.tobytes())
    image.putpalette(palette.tobytes())
    found = read(image, tmp_path / "palette.png", transparency=alpha.tobytes())
    np.testing.assert_allclose(found, on_white(palette[indices], alpha[indices]), atol=1)


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    """RGB with one colour marked as transparent shows white there and nothing else changes."""
    pixels = noise(9, 13, 3)
    found = read(Image.fromarray(pixels), tmp_path / "key.png", transparency=tuple(pixels[2, 3].tolist()))
    pixels[2, 3] = 255
    assert np.array_equal(found, pixels)


def test_cmyk_inks_are_subtracted(tmp_path: Path) -> None:
    """Each full ink takes its own light away."""
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0)}
    inks[0, 0, 0, 255] = (0, 0, 0)
    image = Image.frombytes("CMYK", (len(inks), 1), bytes(ink for four in inks for ink in four))
    assert [tuple(pixel) for pixel in read(image, tmp_path / "cmyk.tiff")[0].tolist()] == list(inks.values())


@each("mode, suffix", [("I;16", "png"), ("I;16B", "tiff")])
@each("top", [65535, 240])
def test_16_bits_are_scaled_by_their_full_range(mode: str, suffix: str, top: int, tmp_path: Path) -> None:
    """65535 is white however dark the picture is, in either byte order."""
    values = np.linspace(0, top, 12).round().reshape(3, 4)
    image = Image.frombytes(mode, (4, 3), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.array_equal(read(image, tmp_path / f"deep.{suffix}")[..., 0], (values / 257).round())


def test_a_float_picture_goes_from_0_to_1(tmp_path: Path) -> None:
    """Mode F within [0, 1] fills the 256 values."""
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(read(Image.fromarray(values), tmp_path / "float.tiff")[..., 1], (values.astype(np.float64) * 255).round())


STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@each("orientation", list(STORED))
def test_every_exif_orientation_comes_in_upright(orientation: int, tmp_path: Path) -> None:
    """A picture stored as the EXIF standard says for its orientation is read as it looked."""
    upright, exif = noise(5, 9, 3), Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert np.array_equal(read(stored, tmp_path / "turned.png", exif=exif), upright)


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    """sRGB to sRGB is the identity, to a rounding."""
    pixels = noise(16, 16, 3)
    np.testing.assert_allclose(read(Image.fromarray(pixels), tmp_path / "srgb.png", icc_profile=SRGB_PROFILE), pixels.astype(int), atol=1)


def test_a_linear_profile_is_converted(tmp_path: Path) -> None:
    """Linear light goes through the sRGB curve of IEC 61966-2-1."""
    pixels = noise(16, 16, 3)
    light = pixels / 255
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    found = read(Image.fromarray(pixels), tmp_path / "linear.png", icc_profile=linear_profile())
    np.testing.assert_allclose(found, curve * 255, atol=1.5)


@each("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"not a profile"])
def test_a_profile_that_does_not_fit_is_passed_over(profile: bytes, tmp_path: Path) -> None:
    """A profile of another colour space, or none at all, leaves the pixels alone."""
    pixels = noise(9, 13, 3)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / "odd.png", icc_profile=profile), pixels)


def truncated_jpeg(path: Path) -> None:
    """The first half of a JPEG file."""
    Image.fromarray(noise(64, 64, 3)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sparse(path: Path, head: bytes, size: int) -> None:
    """A file that claims a size and takes no room."""
    path.write_bytes(head)
    os.truncate(path, size)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read .No such file"),
    "folder": (lambda path: path.mkdir(), "cannot be read .it is not a regular file"),
    "pipe": (os.mkfifo, "cannot be read .it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read .it is not a regular file"),
    "dangling": (lambda path: path.symlink_to("nothing"), "cannot be read .No such file"),
    "a loop": (lambda path: path.symlink_to(path.name), "cannot be read .Too many levels"),
    "below a file": (lambda path: path.parent.rmdir() or path.parent.write_bytes(b"x"), "cannot be read .Not a directory"),
    "a terabyte": (lambda path: sparse(path, b"\xff\xd8\xff", 2**40), "is too large .1099511627776 bytes.*at most 64 MiB of JPEG"),
    "a terabyte of TIFF": (lambda path: sparse(path, b"II*\0", 2**40), "is too large .*at most 256 MiB of TIFF"),
    "zeros": (lambda path: sparse(path, b"", 2**40), "not an image in a supported format"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("a photo of a dog"), "not an image in a supported format"),
    "plain PPM": (lambda path: path.write_bytes(b"P3 1 1 255 1 2 3 "), "not an image in a supported format"),
    "an empty BigTIFF": (lambda path: path.write_bytes(b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"), "is broken"),
    "MP4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp42"), "not an image in a supported format"),
    "truncated": (truncated_jpeg, "is broken"),
    "no pixels": (lambda path: path.write_bytes(png_of(8, 8)), "is broken"),
    "a bomb": (lambda path: path.write_bytes(png_of(20_000, 20_000)), "has 20000x20000 pixels"),
    "a long line": (lambda path: path.write_bytes(png_of(1_000_001, 1)), "has 1000001x1 pixels"),
}


@each("case", list(BROKEN))
def test_a_file_that_is_no_photo_is_refused(case: str, tmp_path: Path) -> None:
    """The error names the file and what is wrong with it."""
    make, words = BROKEN[case]
    path = tmp_path / "folder" / "photo.png"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ImagicError, match=f"photo.png.*{words}"):
        read_photo(path)


@each("name", ["x" * 300, "a\0b", "\ud800"])
def test_a_path_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    """Too long, with a NUL, beyond UTF-8."""
    with pytest.raises(ImagicError, match="cannot be read"):
        read_photo(tmp_path / name)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what the system says."""

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "photo.png"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImagicError, match=r"photo.png cannot be read \(Permission denied\)"):
        read_photo(path)


@each("name", ["狗 🐕.png", "--help", " ", "a\nb\x1b[31m", "\udcff\udc80.jpg", "'\"{}%s.png"])
def test_any_name_is_read_and_can_be_shown(name: str, tmp_path: Path) -> None:
    """Line ends, escapes and bytes that are no UTF-8 are escaped in messages; everything else stays as it is."""
    pixels, path = noise(3, 4, 3), tmp_path / name
    path.write_bytes(bytes_of(Image.fromarray(pixels), "PNG"))
    assert np.array_equal(np.asarray(read_photo(path).image), pixels)
    path.write_bytes(b"text")
    with pytest.raises(ImagicError, match="not an image") as error:
        read_photo(path)
    assert str(error.value).isprintable()
    assert not name.isprintable() or str(path) in str(error.value)


@each("suffix", ["jpg", "txt", "heic", ""])
def test_the_format_is_detected_from_content(suffix: str, tmp_path: Path) -> None:
    """Whatever the name says."""
    pixels = noise(5, 9, 3)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / f"photo.{suffix}", format="PNG"), pixels)


RAISED = {
    struct.error("x"): "its structure is invalid",
    KeyError("x"): "its structure is invalid",
    ZeroDivisionError(): "its structure is invalid",
    RecursionError("x"): "its structure is invalid",
    SyntaxError("x"): "x",
    OSError("x"): "x",
    RuntimeError("x"): "x",
    ValueError(): "its structure is invalid",
}


@each("error", [*RAISED, MemoryError()])
def test_whatever_a_decoder_raises_is_a_refusal(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken, with what the decoder says in words; or too large, where there is no memory for it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    path = tmp_path / "photo.png"
    path.write_bytes(bytes_of(Image.new("RGB", (3, 3)), "PNG"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    words = "is too large" if isinstance(error, MemoryError) else re.escape(f"is broken ({RAISED[error]})")
    with pytest.raises(ImagicError, match=f"photo.png {words}") as refusal:
        read_photo(path)
    assert refusal.value.__cause__ is error


HEADS = [b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0", b"II+\0", b"BM", b"P6\n"]


@each("head", [*HEADS, b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"])
@each("rest", [b"", bytes(30), b"x" * 300])
def test_a_broken_header_is_described_in_words(head: bytes, rest: bytes, tmp_path: Path) -> None:
    """Without the objects and the formats of Pillow's code."""
    with pytest.raises(ImagicError, match=r"photo is broken \(") as refusal:
        read_bytes(head + rest, tmp_path)
    assert not re.search(r"object at 0x|requires a buffer|index out of range|argument", str(refusal.value))


def test_nothing_is_left_changed(tmp_path: Path) -> None:
    """Neither Pillow's limits and openers nor the filters of warnings."""

    def state() -> list[Any]:
        return [Image.MAX_IMAGE_PIXELS, sorted(Image.OPEN), sorted(Image.EXTENSION), list(warnings.filters)]

    Image.init()
    before = state()
    (tmp_path / "bad.tiff").write_bytes(_tiff(9, 9, {258: (3, [8]), 262: (3, [1])}, b""))
    read(Image.fromarray(noise(5, 5, 3)), tmp_path / "photo.png")
    with pytest.raises(ImagicError):
        read_photo(tmp_path / "bad.tiff")
    assert state() == before


def test_what_a_decoder_warns_of_is_not_passed_on(tmp_path: Path) -> None:
    """Tags cut off in EXIF make Pillow warn; warnings are errors here."""
    upright = noise(8, 8, 3)
    data = _png(8, 8, 8, 2, [row.tobytes() for row in upright], _chunk(b"eXIf", _exif(1, {282: (5, [1, 1]), 271: (3, [1] * 9)})[:-20]))
    assert np.array_equal(read_bytes(data, tmp_path), upright)


def slow(data: bytes, folder: Path) -> None:
    """It must be refused for its work."""
    with pytest.raises(ImagicError, match="takes too long to read"):
        read_bytes(data, folder)


def test_many_pieces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of a PNG takes some reads; a good file of some chunks takes few."""
    monkeypatch.setattr(opening._LimitedReads, "reads_left", 1000)
    rows = [bytes(3)]
    assert read_bytes(_png(1, 1, 8, 2, rows, _chunk(b"prVt") * 200), tmp_path).shape == (1, 1, 3)
    slow(_png(1, 1, 8, 2, rows, _chunk(b"prVt") * 1000), tmp_path)
    slow(_png(1, 1, 8, 2, rows, _chunk(b"IDAT") * 1000), tmp_path)


def test_many_scans_of_a_jpeg_are_refused(tmp_path: Path) -> None:
    """Also behind a comment that looks like the end; but what follows the picture does not count, say a video."""
    assert read_bytes(_scans(64, 64, 90), tmp_path).shape == (64, 64, 3)
    assert read_bytes(_scans(64, 64, 9) + b"\xff\xda" * 9999, tmp_path).shape == (64, 64, 3)
    slow(_scans(64, 64, 101), tmp_path)
    slow(_with_segments(_scans(64, 64, 101), _segment(0xFE, b"\xff\xd9")), tmp_path)


def test_much_exif_of_a_jpeg_is_refused(tmp_path: Path) -> None:
    """Pillow joins its segments."""
    jpeg, exif = bytes_of(Image.new("L", (9, 9)), "JPEG"), _segment(0xE1, b"Exif\0\0" + _exif(1).ljust(60_000, b"\0"))
    assert read_bytes(_with_segments(jpeg, exif * 9), tmp_path).shape == (9, 9, 3)
    slow(_with_segments(jpeg, exif * 17), tmp_path)


@each("chunk", [b"zTXt", b"iCCP"])
def test_many_compressed_chunks_of_a_png_are_refused(chunk: bytes, tmp_path: Path) -> None:
    """Pillow unpacks a megabyte of each, and counts only those with a name."""
    chunks, rows = _chunk(chunk, b"\0\0" + zlib.compress(b"x")), [bytes(3)]
    assert read_bytes(_png(1, 1, 8, 2, rows, chunks * 500), tmp_path).shape == (1, 1, 3)
    slow(_png(1, 1, 8, 2, rows, chunks * 501), tmp_path)


def test_slow_decoders_get_fewer_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PPM of 254 values is read by a loop in Python, one of 255 is not."""
    monkeypatch.setattr(opening, "MAX_PIXELS", 800)
    data = b" 11 10 254\n" + bytes(range(254)) + bytes(76)
    slow(b"P6" + data, tmp_path)
    assert read_bytes(b"P6" + data.replace(b"254\n", b"255\n", 1), tmp_path).shape == (10, 11, 3)
    monkeypatch.setattr(opening, "MAX_PIXELS", 880)
    assert read_bytes(b"P6" + data, tmp_path)[0, 1].tolist() == [3, 4, 5]


GRAY_TAGS = {258: (3, [8]), 262: (3, [1])}


def test_many_numbers_in_the_tags_of_a_tiff_are_refused(tmp_path: Path) -> None:
    """Bytes are no numbers."""
    assert read_bytes(_tiff(9, 9, GRAY_TAGS | {50_000: (7, [5] * 300_000)}, bytes(81)), tmp_path).shape == (9, 9, 3)
    slow(_tiff(9, 9, GRAY_TAGS | {50_000: (3, [5] * 300_000)}, bytes(81)), tmp_path)


def test_a_directory_of_exif_in_a_tiff_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers, which may be millions, are never made."""
    pixels = noise(9, 9)
    plain = _tiff(9, 9, GRAY_TAGS | {34_665: (4, [0])}, pixels.tobytes())
    data = _tiff(9, 9, GRAY_TAGS | {34_665: (4, [len(plain)])}, pixels.tobytes())
    found: list[int] = []
    monkeypatch.setattr(Image.Exif, "get_ifd", lambda self, tag: found.append(tag))
    assert np.array_equal(read_bytes(data + _directory({37_500: (5, [1, 0] * 1000)}, "<", len(plain)), tmp_path)[..., 0], pixels)
    assert not found


def test_a_tile_far_larger_than_the_picture_is_refused(tmp_path: Path) -> None:
    """A tile of a gigabyte takes seconds, whatever is shown of it."""
    body = zlib.compress(bytes(16 * 16))
    tags = GRAY_TAGS | {259: (3, [8]), 324: (4, [0]), 325: (4, [len(body)])}
    assert read_bytes(_tiff(9, 9, tags | {322: (4, [16]), 323: (4, [16])}, body), tmp_path).shape == (9, 9, 3)
    with pytest.raises(ImagicError, match="tiles are far larger"):
        read_bytes(_tiff(9, 9, tags | {322: (4, [2048]), 323: (4, [2064])}, body), tmp_path)


def test_the_first_of_several_pictures_is_read(tmp_path: Path) -> None:
    """Of an animation or of pages."""
    first, second = (Image.fromarray(noise(9, 9, seed=seed)) for seed in (0, 1))
    for format in ("GIF", "PNG", "TIFF"):
        assert np.array_equal(
            read(first, tmp_path / "several", format=format, save_all=True, append_images=[second])[..., 0], np.asarray(first)
        )


def test_12_bits_are_scaled_by_their_full_range(tmp_path: Path) -> None:
    """Two pixels in three bytes; 4095 is white."""
    found = read_bytes(_tiff(4, 1, {258: (3, [12]), 262: (3, [1])}, bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])), tmp_path)
    assert found[0, :, 0].tolist() == [0, 255, 128, 0]


@each("bits, dtype, top", [(16, "<u2", 65535), (32, "<f4", 1.0)])
def test_white_may_be_zero(bits: int, dtype: str, top: float, tmp_path: Path) -> None:
    """A TIFF may count from white to black."""
    gray = noise(9, 9)
    tags = {258: (3, [bits]), 262: (3, [0]), 339: (3, [3 if bits == 32 else 1])}
    assert np.array_equal(read_bytes(_tiff(9, 9, tags, (top - gray * (top / 255)).astype(dtype).tobytes()), tmp_path)[..., 1], gray)


@each("most", [200, 65535])
def test_a_dark_pgm_of_16_bits_stays_dark(most: int, tmp_path: Path) -> None:
    """Its header says the range."""
    values = np.linspace(0, most, 12).round()
    found = read_bytes(b"P5 4 3 65535\n" + values.astype(">u2").tobytes(), tmp_path)
    assert np.array_equal(found[..., 0].ravel(), (values / 257).round())


def test_highlights_of_floats_are_clipped(tmp_path: Path) -> None:
    """A little above 1 is still a picture from 0 to 1, and a little below 0 is black."""
    found = read(Image.fromarray(np.array([[-0.1, 0, 0.5, 1, 1.3]], np.float32)), tmp_path / "float.tiff")
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@each("odd", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@each("place", [0, 5])
def test_floats_that_are_no_picture_are_refused(odd: float, place: int, tmp_path: Path) -> None:
    """Not finite, or beyond every range."""
    values = np.linspace(0, 1, 9, dtype=np.float32)
    values[place] = odd
    with pytest.raises(ImagicError, match=r"of an unknown range|not all its values are finite"):
        read(Image.fromarray(values.reshape(3, 3)), tmp_path / "float.tiff")


def test_a_transparent_gray_of_16_bits_becomes_white(tmp_path: Path) -> None:
    """It is compared in 16 bits; a neighbour of the same 8 bits stays."""
    data = _png(3, 1, 16, 0, [struct.pack(">3H", 1000, 1001, 0)], _chunk(b"tRNS", struct.pack(">H", 1000)))
    assert read_bytes(data, tmp_path)[0, :, 0].tolist() == [255, 4, 0]


def test_lab_is_converted(tmp_path: Path) -> None:
    """Grays of CIE L* by its formula and the curve of sRGB."""
    lightness = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.merge("LAB", [Image.fromarray(lightness), *[Image.new("L", (16, 16), 128)] * 2])
    np.testing.assert_allclose(read(image, tmp_path / "lab.tiff")[..., 1], _of_lightness(lightness / 2.55), atol=2)


def test_a_profile_of_inks_is_converted(tmp_path: Path) -> None:
    """One in which only black counts, and goes evenly in CIE L*."""
    inks = noise(16, 16, 4)
    image = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    np.testing.assert_allclose(
        read(image, tmp_path / "inks.tiff", icc_profile=_of_inks())[..., 1], _of_lightness(100 - inks[..., 3] / 2.55), atol=3
    )


@each("mode", ["L", "LA", "I;16"])
def test_a_gray_profile_is_converted(mode: str, tmp_path: Path) -> None:
    """Also of a gray with opacity, and of one of 16 bits."""
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(gray)
    if mode == "LA":
        image.putalpha(255)
    if mode == "I;16":
        image = Image.frombytes("I;16", (16, 16), (gray.astype("<u2") * 257).tobytes())
    light = (gray / 255) ** 2
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(read(image, tmp_path / "gray.png", icc_profile=gray_profile())[..., 0], expected, atol=1.5)


def test_colours_are_converted_before_they_are_mixed_with_white(tmp_path: Path) -> None:
    """As browsers do: half of linear black is middle gray of sRGB."""
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert read(image, tmp_path / "half.png", icc_profile=linear_profile())[0, 0].tolist() == [127, 127, 127]


def test_a_profile_that_would_take_hours_is_passed_over(tmp_path: Path) -> None:
    """Ten thousand curves before each node of a table."""
    pixels = noise(9, 9, 3)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / "hours.png", icc_profile=_endless(10_000)), pixels)


def test_exif_that_points_at_itself_is_read(tmp_path: Path) -> None:
    """A directory that is its own follower and its own child."""
    upright = noise(5, 9, 3)
    rows = [row.tobytes() for row in STORED[6](upright)]
    exif = _exif(6, {34665: (4, [8]), 34853: (4, [8]), 40965: (4, [8])}, following=8)
    assert np.array_equal(read_bytes(_png(5, 9, 8, 2, rows, _chunk(b"eXIf", exif)), tmp_path), upright)


@each("exif", [b"", b"II", b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\xff\xff", _exif(9), _exif(0), _exif(6)[:14]])
def test_exif_that_says_nothing_leaves_the_picture_as_it_is(exif: bytes, tmp_path: Path) -> None:
    """Broken, cut off, or of an orientation that there is not."""
    upright = noise(5, 9, 3)
    data = _png(9, 5, 8, 2, [row.tobytes() for row in upright], _chunk(b"eXIf", exif))
    assert np.array_equal(read_bytes(data, tmp_path), upright)


def test_exif_of_megabytes_is_refused(tmp_path: Path) -> None:
    """An orientation of millions of numbers would be made into a tuple."""
    with pytest.raises(ImagicError, match="EXIF is too large"):
        read_bytes(_png(1, 1, 8, 2, [bytes(3)], _chunk(b"eXIf", _exif(6, {ORIENTATION: (3, [6] * 600_000)}))), tmp_path)


@each("mode", ["RGB", "RGBA", "CMYK", "I;16", "P"])
@each("size", [(40, 30), (1000, 1), (1, 1000)])
def test_a_picture_in_pieces_is_the_same(mode: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, and parts of rows where these are long."""
    image = Image.frombytes(
        mode, size, noise(size[0] * size[1] * (2 if mode == "I;16" else len(Image.new(mode, (1, 1)).getbands()))).tobytes()
    )
    whole = read(image, tmp_path / "photo.tiff")
    monkeypatch.setattr(conversion, "TILE_PIXELS", 70)
    assert np.array_equal(read(image, tmp_path / "photo.tiff"), whole)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@each("orientation", list(STORED))
def test_every_turn_of_an_avif_comes_in_upright(orientation: int, tmp_path: Path) -> None:
    """Its boxes turn it, once."""
    upright, exif = np.asarray(Image.fromarray(noise(2, 3, 3)).resize((48, 32), Image.Resampling.NEAREST)), Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    found = read(stored, tmp_path / "turned.avif", exif=exif, quality=95, subsampling="4:4:4")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 6


def test_an_avif_where_pillow_has_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any format that is not known."""
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(ImagicError, match="not an image in a supported format"):
        read_bytes(b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", tmp_path)


@each("orientation", list(STORED))
def test_every_turn_of_a_heic_comes_in_upright(orientation: int, tmp_path: Path) -> None:
    """Its boxes turn it; the same in its EXIF must not turn it again."""
    upright = np.asarray(Image.fromarray(noise(2, 3, 3)).resize((48, 32), Image.Resampling.NEAREST))
    data = heic(np.ascontiguousarray(STORED[orientation](upright)), exif=b"Exif\0\0" + _exif(orientation))
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    found = read_bytes(data, tmp_path)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 6


def test_what_xmp_says_of_a_heic_does_not_turn_it(tmp_path: Path) -> None:
    """Neither once nor twice."""
    pixels = np.asarray(Image.fromarray(noise(2, 3, 3)).resize((48, 32), Image.Resampling.NEAREST))
    data = heic(pixels, xmp=b'<x tiff:Orientation="1"/>').replace(
        b'Orientation="1"', b'Orientation="6"'
    )  # after boxes have been made of it
    assert read_bytes(data, tmp_path).shape == pixels.shape


def test_the_profile_of_a_heic_is_converted(tmp_path: Path) -> None:
    """Linear light goes through the sRGB curve."""
    light = np.full((32, 32, 3), 55, np.uint8)
    found = read_bytes(heic(light, icc_profile=linear_profile(), icc_profile_type="prof"), tmp_path)
    assert abs(found.mean() - 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)) < 4


def test_a_heic_over_the_cap_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its boxes say."""
    data = heic(noise(32, 48, 3))
    monkeypatch.setattr(opening, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(ImagicError, match="has 48x32 pixels"):
        read_bytes(data, tmp_path)


def test_a_heic_without_the_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is a command."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImagicError, match=r"is a HEIC file.*pip install 'imagic-lora\[heic\]'"):
        read_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", tmp_path)


def test_the_package_for_heic_is_imported_only_for_it(tmp_path: Path) -> None:
    """A fresh Python that has read a PNG has not met it."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (3, 3)).save(path)
    code = f"import sys; from pathlib import Path; from imagic_lora.photos.reading import read_photo; read_photo(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('pillow_heif' in sys.modules)"], check=True)


def test_a_photo_over_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap itself passes; one pixel less of it does not, and the error says the size."""
    path = tmp_path / "photo.png"
    Image.fromarray(noise(5, 8, 3)).save(path)
    monkeypatch.setattr(opening, "MAX_PIXELS", 40)
    assert read_photo(path).image.size == (8, 5)
    monkeypatch.setattr(opening, "MAX_PIXELS", 39)
    with pytest.raises(ImagicError, match="8x5 pixels"):
        read_photo(path)


@each("size", SIZES)
@each("resolution, multiple", CANVASES)
def test_a_canvas_has_whole_multiples_within_its_area(size: tuple[int, int], resolution: int, multiple: int) -> None:
    """Both sides are multiples and the area is at most the resolution squared."""
    height, width = to_canvas(Image.new("RGB", size), resolution, multiple).pixels.shape[2:]
    assert width % multiple == height % multiple == 0
    assert 0 < width * height <= resolution**2


def test_a_canvas_is_never_smaller_than_one_multiple() -> None:
    """Where the resolution is below the multiple, the canvas is one multiple by one."""
    assert to_canvas(Image.new("RGB", (30, 20)), 8, 32).pixels.shape == (1, 3, 32, 32)


@each("size", SIZES)
@each("resolution, multiple", CANVASES)
def test_a_photo_is_never_squashed(size: tuple[int, int], resolution: int, multiple: int) -> None:
    """The photo's shape is kept to within a pixel, and it spans its canvas from side to side or from top to bottom."""
    canvas = to_canvas(Image.new("RGB", size), resolution, multiple)
    left, top, right, bottom = canvas.box
    wide, high = right - left, bottom - top
    assert abs(wide - high * size[0] / size[1]) <= 1 or abs(high - wide * size[1] / size[0]) <= 1
    assert wide == canvas.pixels.shape[3] or high == canvas.pixels.shape[2]


@each("size", SIZES)
def test_a_picture_is_restored_to_the_size_of_the_photo(size: tuple[int, int]) -> None:
    """Whatever the canvas, the edit comes back at the photo's size, and of one colour stays of one colour."""
    canvas = to_canvas(Image.new("RGB", size, (200, 30, 90)), 64, 8)
    assert canvas.photo().size == size
    assert canvas.photo().getcolors() == [(size[0] * size[1], (200, 30, 90))]


@each("size", [(64, 64), (128, 32), (56, 72)])
def test_a_picture_of_the_right_size_is_untouched(size: tuple[int, int]) -> None:
    """What needs no scaling and no padding comes back bit for bit."""
    pixels = noise(size[1], size[0], 3)
    canvas = to_canvas(Image.fromarray(pixels), 64, 8)
    assert canvas.box == (0, 0, *size)
    assert np.array_equal(np.asarray(canvas.photo()), pixels)


def test_what_the_photo_lacks_repeats_its_edge() -> None:
    """Outside the box the canvas equals NumPy's edge padding of what is inside."""
    canvas = to_canvas(Image.fromarray(noise(40, 50, 3)), 64, 8)
    left, top, right, bottom = canvas.box
    pixels = canvas.pixels[0].numpy()
    around = ((0, 0), (top, pixels.shape[1] - bottom), (left, pixels.shape[2] - right))
    assert (right - left, bottom - top) != pixels.shape[:0:-1]
    assert np.array_equal(pixels, np.pad(pixels[:, top:bottom, left:right], around, mode="edge"))


def test_pixels_and_image_are_inverse_for_every_value() -> None:
    """All 256 values of each channel survive the way to [-1, 1] and back."""
    values = np.stack([np.arange(256), np.arange(256)[::-1], np.roll(np.arange(256), 99)], axis=-1).astype(np.uint8).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(to_image(to_pixels(Image.fromarray(values))[0])), values)


def test_pixels_are_linear_from_minus_1_to_1() -> None:
    """Element by element against float64, channels first."""
    values = noise(5, 9, 3)
    expected = torch.from_numpy(values.astype(np.float64).transpose(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(to_pixels(Image.fromarray(values)).double(), expected, rtol=0, atol=1e-6)


def test_an_image_of_numbers_beyond_the_range_is_clamped() -> None:
    """Below -1 is black and above 1 is white."""
    assert np.asarray(to_image(torch.tensor([-9.0, -1.0, 1.0, 9.0]).expand(3, 1, 4)))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_metadata_comes_back_from_a_png(tmp_path: Path) -> None:
    """What was written is read, and the pixels are unchanged."""
    path, metadata, pixels = tmp_path / "edit.png", {"prompt": "a dög [jumping] 狗", "eta": 0.7, "edit": {"steps": 50}}, noise(5, 9, 3)
    write_png(Image.fromarray(pixels), path, metadata)
    assert read_metadata(path) == metadata
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


FOREIGN = {
    "another format": (bytes_of(Image.new("RGB", (3, 3)), "JPEG"), "has no imagic-lora metadata"),
    "no metadata": (bytes_of(Image.new("RGB", (3, 3)), "PNG"), "has no imagic-lora metadata"),
    "a list": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"tEXt", b"imagic-lora\0[1]")), "has no imagic-lora metadata"),
    "no JSON": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"tEXt", b"imagic-lora\0{")), "is broken"),
    "too deep": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"tEXt", b"imagic-lora\0" + b"[" * 100_000)), "is broken"),
    "too many digits": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"tEXt", b"imagic-lora\0" + b"9" * 100_000)), "is broken"),
    "a bomb": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"zTXt", b"imagic-lora\0\0" + zlib.compress(bytes(5_000_000)))), "is broken"),
    "slow": (_png(1, 1, 8, 2, [bytes(3)], _chunk(b"zTXt", b"\0\0") * 501), "takes too long to read"),
    "text": (b"text", "not an image"),
}


@each("case", list(FOREIGN))
def test_metadata_of_strangers_is_refused(case: str, tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "edit.png"
    path.write_bytes(FOREIGN[case][0])
    with pytest.raises(ImagicError, match=f"edit.png.*{FOREIGN[case][1]}"):
        read_metadata(path)


@each("title, top", [("", 8), ("a dog jumping, and a title far too long for a page this narrow", 34)])
def test_a_sheet_has_a_cell_for_every_picture(title: str, top: int) -> None:
    """Cells of 100 with gaps of 8 and labels of 24, as many columns as the longest row."""
    one = ("label", Image.new("RGB", (10, 10)))
    assert sheet([[one], [one, one, one]], title, cell=100).size == (8 + 3 * 108, top + 2 * 132)


@each("size, shown", [((40, 20), (100, 50)), ((20, 40), (50, 100)), ((400, 100), (100, 25)), ((100, 100), (100, 100))])
def test_a_sheet_keeps_the_shape_of_a_picture(size: tuple[int, int], shown: tuple[int, int]) -> None:
    """A picture fills its cell as far as its shape allows."""
    page = np.asarray(sheet([[("", Image.new("RGB", size, (255, 0, 0)))]], cell=100))
    rows, columns = np.nonzero((page == (255, 0, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == shown


def test_a_long_title_takes_no_time() -> None:
    """As much of it as there is room for."""
    start = time.perf_counter()
    sheet([[("", Image.new("RGB", (8, 8)))]], "dog " * 5000)
    assert time.perf_counter() - start < 1
