"""A photo from anywhere: read right, or refused, in bounded time and memory."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features

from ..core.errors import ImagicError
from .colour import _PIECE, _srgb_on_white
from .png import METADATA_KEY

MAX_PIXELS = 50_000_000  # read in less than 5 s of one core and 1.5 GB, whatever the format
MAX_SIDE = 1_000_000  # scaling by Lanczos takes 48 bytes for each pixel of a side
MAX_BYTES = 2**28
_MAX_CODED = {"JPEG": 2**26, "WEBP": 2**26, "AVIF": 2**25, "HEIF": 2**25}  # bytes of what is slow, or held several times, in decoding
_MAX_READS = 500_000
_MAX_SCANS = 100
_MAX_EXIF = 2**20
_MAX_TAG_NUMBERS = 2**18
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"P4": "PPM",  # not P1 to P3, in plain text, whose decoder can be made to take hours
    b"P5": "PPM",
    b"P6": "PPM",
    b"Pf": "PPM",
}
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of a JPEG's segment
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_REMEDY = "give a JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF file that other programs can open"


@dataclass(frozen=True)
class Photo:
    """A picture as the user gave it: upright, sRGB, on white.

    Args:
        image: mode RGB, at its own size.
        sha256: of the file's bytes.
    """

    image: Image.Image
    sha256: str


def read_photo(path: Path) -> Photo:
    """Reads a photo: turned upright by its EXIF orientation, converted to sRGB by its colour profile, composited on white.

    Its format is told by its content. Of an animation or a file of several pages the first picture is taken.

    Raises:
        ImagicError: no such file, no regular file, empty, not an image of a known format, broken, or over :data:`MAX_PIXELS`.
    """
    with _refusing(path):
        kind, data = _content(path)
        image = _opened(kind, data)
        image.load()
        orientation = _orientation(image)
        picture = _srgb_on_white(image)
        del image  # before turning takes as much memory again
        return Photo(_upright(picture, orientation), hashlib.sha256(data).hexdigest())


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Makes an :class:`ImagicError` that names the file of whatever is raised inside, and keeps warnings quiet."""
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImagicError as error:
        raise ImagicError(f"{name} {error.got}", error.expected, error.remedy) from error
    except (Image.DecompressionBombError, MemoryError) as error:  # a file that asks for that much memory claims too large a size
        why = str(error) or "there is no memory for it"
        raise ImagicError(f"{name} is too large ({why})", f"at most {MAX_PIXELS // 10**6} megapixels", "scale it down first") from error
    except Exception as error:  # there is nothing that decoders do not raise: struct.error, KeyError, ZeroDivisionError, RecursionError
        raise ImagicError(f"{name} is broken ({str(error) or type(error).__name__})", "a whole image file", _REMEDY) from error


def _content(path: Path) -> tuple[str, bytes]:
    """The format of a picture file, in Pillow's words, and all its bytes."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe may make us wait forever, a device may never end
            raise ImagicError("cannot be read (it is not a regular file)", "an image file", "check the path")
        with path.open("rb") as file:
            head = file.read(256)
            if not head:
                raise ImagicError("is empty", "an image file", _REMEDY)
            kind = _kind(head)
            if kind is None:
                raise ImagicError("is not an image of a known format", "an image file", _REMEDY)
            limit = _MAX_CODED.get(kind, MAX_BYTES)
            data = head + file.read(limit + 1 - len(head)) if about.st_size <= limit else b""
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
        why = getattr(error, "strerror", None) or error
        raise ImagicError(f"cannot be read ({why})", "an image file", "check the path") from error
    if not 0 < len(data) <= limit:
        raise ImagicError(f"is too large ({about.st_size} bytes)", f"at most {limit >> 20} MiB of {kind}", "scale it down first")
    return kind, data


def _kind(head: bytes) -> str | None:
    """The format that the first bytes of a file tell of."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        box = head[8 : int.from_bytes(head[:4], "big")]
        brands = {box[at : at + 4] for at in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF" if features.check("avif") else None
        return "HEIF" if brands & _HEIF_BRANDS else None
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


class _Sips(io.BytesIO):
    """A file in memory that can be read so many times: each piece of a file made of millions is a turn of a decoder's loop."""

    left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise _slow()
        return super().read(size)


def _slow() -> ImagicError:
    return ImagicError("is stored in a way that takes long to read", "an image file of a common kind", "save it as PNG or JPEG")


def _opened(kind: str, data: bytes) -> Image.Image:
    """A picture of which the header has been read, and found to be neither too large nor too much work."""
    if kind in ("AVIF", "HEIF"):  # boxes turn these; what EXIF and XMP say of it is for programs that do not know the boxes
        data = re.sub(rb"(infe.{8,10}?)(Exif|mime)", rb"\1none", data, flags=re.DOTALL)
    if kind == "HEIF":
        return _heif(data)
    if kind in _CHECKS:
        _CHECKS[kind](data)
    image = Image.open(_Sips(data), formats=[kind])
    _check_size(image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    if any(tile.codec_name in Image.DECODERS for tile in image.tile) and image.width * image.height > MAX_PIXELS // 8:
        raise _slow()  # these decoders are written in Python
    if "transparency" in image.info and any(tile.args == "RGB;16B" for tile in image.tile):  # Pillow would look for it in 8 bits
        raise ImagicError("has a transparent colour of 16 bits", "8 bits, or an alpha channel", "save it so")
    return image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        expected = f"at most {MAX_PIXELS // 10**6} megapixels, and {MAX_SIDE} pixels to a side"
        raise ImagicError(f"has {width}x{height} pixels", expected, "scale it down first")


def _check_segments(jpeg: bytes) -> None:
    """Refuses a JPEG of many scans, each of which takes its time over all pixels, were it of ten bytes; or of much EXIF."""
    at = scans = exif = 0
    for _ in range(10_000):
        found = _MARKER.search(jpeg, at)
        if found is None or found[1] == b"\xd9":
            return
        at = found.end()
        scans += found[1] == b"\xda"
        exif += jpeg.startswith(b"Exif\0\0", at + 2)
        if scans > _MAX_SCANS or exif > 16:
            break
        at += int.from_bytes(jpeg[at : at + 2], "big")
    raise _slow()


def _check_chunks(png: bytes) -> None:
    """Refuses a PNG of many compressed chunks, each of which may unpack to a megabyte."""
    if sum(map(png.count, (b"iCCP", b"zTXt", b"iTXt"))) > 500:
        raise _slow()


def _check_tags(tiff: bytes) -> None:
    """Refuses a TIFF file whose tags, as Python's numbers, would fill the memory."""
    order = "<" if tiff.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    table = struct.iter_unpack(f"{order}HHII", tiff[start + 2 : start + 2 + 12 * entries])
    if sum(count for _, kind, count, _ in table if kind not in (1, 2, 7)) > _MAX_TAG_NUMBERS:  # those three are bytes
        raise _slow()


_CHECKS = {"JPEG": _check_segments, "PNG": _check_chunks, "TIFF": _check_tags}


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuses a camera's raw file, of which Pillow shows a small preview, and tiles far larger than the picture."""
    tags = image.tag_v2
    if tags.get(254, 0) & 1:
        raise ImagicError("holds only a preview, as raw files do", "a finished picture", "develop it with the camera's program")
    if tags.get(322, 0) * tags.get(323, 0) > max(_PIECE, 4 * image.width * image.height):
        raise ValueError("its tiles are far larger than the picture")
    image.is_animated = True  # so that load() passes over the directories below, whose numbers may fill the memory too


def _heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        remedy = "pip install 'imagic-lora[heic]', or save it as JPEG"
        raise ImagicError("is a HEIC file, which takes the pillow-heif package to read", "that package", remedy) from error
    file = pillow_heif.open_heif(io.BytesIO(data))
    _check_size(file.size)
    return file.to_pillow()


def _orientation(image: Image.Image) -> Any:
    """What EXIF says of it; where that cannot be read, the picture is taken to be upright, as browsers do."""
    if len(image.info.get("exif") or b"") > _MAX_EXIF:
        raise ValueError("its EXIF is too large")
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _upright(picture: Image.Image, orientation: Any) -> Image.Image:
    if orientation is not None:
        picture.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def read_metadata(path: Path) -> dict[str, Any]:
    """What :func:`write_png` stored.

    Raises:
        ImagicError: no such file, no PNG, or one that was not made here.
    """
    with _refusing(path):
        kind, data = _content(path)
        metadata = json.loads(_opened(kind, data).info.get(METADATA_KEY, "null")) if kind == "PNG" else None
        if not isinstance(metadata, dict):
            raise ImagicError("does not say how it was made", "a PNG written by imagic-lora edit", "give the picture as it was written")
        return metadata
