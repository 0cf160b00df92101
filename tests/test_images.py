"""A photo in, a canvas, a PNG out: against Pillow, NumPy and closed forms."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from imagic_lora import images
from imagic_lora.errors import ImagicError
from imagic_lora.images import read_metadata, read_photo, sheet, to_canvas, to_image, to_pixels, write_png

ORIENTATION = 0x0112
SIZES = [(64, 64), (50, 40), (1, 1), (1, 300), (3000, 7), (640, 427), (37, 91)]
CANVASES = [(64, 8), (64, 64), (100, 16), (512, 8)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


def linear_profile() -> bytes:
    """The profile of sRGB's primaries with linear light: Pillow's sRGB with its tone curve replaced by a gamma of 1."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    start = profile.index(b"para", 128 + 4 + 12 * struct.unpack(">I", profile[128:132])[0])
    profile[start + 8 : start + 10] = struct.pack(">H", 0)
    profile[start + 12 : start + 16] = struct.pack(">i", 1 << 16)
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
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


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I;16B", "tiff")])
@pytest.mark.parametrize("top", [65535, 240])
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


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_comes_in_upright(orientation: int, tmp_path: Path) -> None:
    """A picture stored as the EXIF standard says for its orientation is read as it looked."""
    upright, exif = noise(5, 9, 3), Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert np.array_equal(read(stored, tmp_path / "turned.png", exif=exif), upright)


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    """sRGB to sRGB is the identity, to a rounding."""
    pixels, profile = noise(16, 16, 3), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_allclose(read(Image.fromarray(pixels), tmp_path / "srgb.png", icc_profile=profile), pixels.astype(int), atol=1)


def test_a_linear_profile_is_converted(tmp_path: Path) -> None:
    """Linear light goes through the sRGB curve of IEC 61966-2-1."""
    pixels = noise(16, 16, 3)
    light = pixels / 255
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    found = read(Image.fromarray(pixels), tmp_path / "linear.png", icc_profile=linear_profile())
    np.testing.assert_allclose(found, curve * 255, atol=1.5)


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"not a profile"])
def test_a_profile_that_does_not_fit_is_passed_over(profile: bytes, tmp_path: Path) -> None:
    """A profile of another colour space, or none at all, leaves the pixels alone."""
    pixels = noise(9, 13, 3)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / "odd.png", icc_profile=profile), pixels)


def truncated_jpeg(path: Path) -> None:
    """The first half of a JPEG file."""
    Image.fromarray(noise(64, 64, 3)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "missing": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("a photo of a dog"), "not an image of a known format"),
    "truncated": (truncated_jpeg, "is broken"),
    "no pixels": (lambda path: path.write_bytes(png_of(8, 8)), "is broken"),
    "a bomb": (lambda path: path.write_bytes(png_of(20_000, 20_000)), "too large"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_photo_is_refused(case: str, tmp_path: Path) -> None:
    """The error names the file and what is wrong with it."""
    make, words = BROKEN[case]
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ImagicError, match=f"photo.png.*{words}"):
        read_photo(path)


def test_a_photo_over_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap itself passes; one pixel less of it does not, and the error says the size."""
    path = tmp_path / "photo.png"
    Image.fromarray(noise(5, 8, 3)).save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 40)
    assert read_photo(path).image.size == (8, 5)
    monkeypatch.setattr(images, "MAX_PIXELS", 39)
    with pytest.raises(ImagicError, match="8x5 pixels"):
        read_photo(path)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resolution", "multiple"), CANVASES)
def test_a_canvas_has_whole_multiples_within_its_area(size: tuple[int, int], resolution: int, multiple: int) -> None:
    """Both sides are multiples and the area is at most the resolution squared."""
    height, width = to_canvas(Image.new("RGB", size), resolution, multiple).pixels.shape[2:]
    assert width % multiple == height % multiple == 0
    assert 0 < width * height <= resolution**2


def test_a_canvas_is_never_smaller_than_one_multiple() -> None:
    """Where the resolution is below the multiple, the canvas is one multiple by one."""
    assert to_canvas(Image.new("RGB", (30, 20)), 8, 32).pixels.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resolution", "multiple"), CANVASES)
def test_a_photo_is_never_squashed(size: tuple[int, int], resolution: int, multiple: int) -> None:
    """The photo's shape is kept to within a pixel, and it spans its canvas from side to side or from top to bottom."""
    canvas = to_canvas(Image.new("RGB", size), resolution, multiple)
    left, top, right, bottom = canvas.box
    wide, high = right - left, bottom - top
    assert abs(wide - high * size[0] / size[1]) <= 1 or abs(high - wide * size[1] / size[0]) <= 1
    assert wide == canvas.pixels.shape[3] or high == canvas.pixels.shape[2]


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_is_restored_to_the_size_of_the_photo(size: tuple[int, int]) -> None:
    """Whatever the canvas, the edit comes back at the photo's size, and of one colour stays of one colour."""
    canvas = to_canvas(Image.new("RGB", size, (200, 30, 90)), 64, 8)
    assert canvas.photo().size == size
    assert canvas.photo().getcolors() == [(size[0] * size[1], (200, 30, 90))]


@pytest.mark.parametrize("size", [(64, 64), (128, 32), (56, 72)])
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
    """What was written is read, beside untouched pixels."""
    path, metadata, pixels = tmp_path / "edit.png", {"prompt": "a dög [jumping] 狗", "eta": 0.7, "edit": {"steps": 50}}, noise(5, 9, 3)
    write_png(Image.fromarray(pixels), path, metadata)
    assert read_metadata(path) == metadata
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


@pytest.mark.parametrize(("title", "top"), [("", 8), ("a dog jumping, and a title far too long for a page this narrow", 34)])
def test_a_sheet_has_a_cell_for_every_picture(title: str, top: int) -> None:
    """Cells of 100 with gaps of 8 and labels of 24, as many columns as the longest row."""
    one = ("label", Image.new("RGB", (10, 10)))
    assert sheet([[one], [one, one, one]], title, cell=100).size == (8 + 3 * 108, top + 2 * 132)


@pytest.mark.parametrize(
    ("size", "shown"), [((40, 20), (100, 50)), ((20, 40), (50, 100)), ((400, 100), (100, 25)), ((100, 100), (100, 100))]
)
def test_a_sheet_keeps_the_shape_of_a_picture(size: tuple[int, int], shown: tuple[int, int]) -> None:
    """A picture fills its cell as far as its shape allows."""
    page = np.asarray(sheet([[("", Image.new("RGB", size, (255, 0, 0)))]], cell=100))
    rows, columns = np.nonzero((page == (255, 0, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == shown
