"""Reading a photo from an untrusted file: it is decoded correctly or rejected, in bounded time and memory."""

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
from .colour import TILE_PIXELS, srgb_on_white
from .png import METADATA_KEY

MAX_PIXELS = 50_000_000  # read in less than 5 s on one core and in 1.5 GB, in every format
MAX_SIDE = 1_000_000  # pixels; Lanczos resampling needs 48 bytes for each pixel of a side
MAX_BYTES = 2**28  # of a file
_MAX_CODED = {
    "JPEG": 2**26,
    "WEBP": 2**26,
    "AVIF": 2**25,
    "HEIF": 2**25,
}  # bytes; slow decoders, or ones that copy the data
_MAX_READS = 500_000
_MAX_SCANS = 100  # of a JPEG
_MAX_JPEG_EXIF = 16  # segments
_MAX_EXIF = 2**20  # bytes
_MAX_COMPRESSED_CHUNKS = 500  # of a PNG
_MAX_TAG_NUMBERS = 2**18  # in the tags of a TIFF file
_BYTE_TYPES = (1, 2, 7)  # of TIFF tags: BYTE, ASCII and UNDEFINED, which Pillow keeps as bytes
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"P4": "PPM",  # P1 to P3 are plain text and left out: their decoder can be made to run for hours
    b"P5": "PPM",
    b"P6": "PPM",
    b"Pf": "PPM",
}
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # start of a segment of a JPEG
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_REMEDY = "give a JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF file that other programs can open"


@dataclass(frozen=True)
class Photo:
    """A photo that was read from a file: upright, sRGB, on white.

    Args:
        image: mode RGB, at its original size.
        sha256: hash of the file's bytes, in hexadecimal.
    """

    image: Image.Image
    sha256: str


def read_photo(path: Path) -> Photo:
    """Reads a photo, rotates it by its EXIF orientation, converts it to sRGB by its colour profile and composites it on white.

    The format is detected from the file's content. An animation or a file of several pages gives its first image.

    Raises:
        ImagicError: the file does not exist, is not a regular file, is empty, is not in a supported format, is broken, or has more than
            :data:`MAX_PIXELS` pixels.
    """
    with _imagic_errors(path):
        image_format, data = _read_bytes(path)
        image = _open_image(image_format, data)
        image.load()
        orientation = _orientation(image)
        converted = srgb_on_white(image)
        del image  # rotating needs as much memory again
        return Photo(_upright(converted, orientation), hashlib.sha256(data).hexdigest())


@contextmanager
def _imagic_errors(path: Path) -> Iterator[None]:
    """Converts every exception into an :class:`ImagicError` that names the file, and suppresses warnings."""
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImagicError as error:
        raise ImagicError(f"{name} {error.got}", error.expected, error.remedy) from error
    except (Image.DecompressionBombError, MemoryError) as error:  # running out of memory means that the file claims too large a size
        why = str(error) or "not enough memory"
        raise ImagicError(f"{name} is too large ({why})", f"at most {MAX_PIXELS // 10**6} megapixels", "scale it down first") from error
    except Exception as error:  # decoders raise anything: struct.error, KeyError, ZeroDivisionError, RecursionError
        raise ImagicError(f"{name} is broken ({str(error) or type(error).__name__})", "a complete image file", _REMEDY) from error


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """The format of an image file, by its name in Pillow, and all its bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may block forever, and a device may be endless
            raise ImagicError("cannot be read (it is not a regular file)", "an image file", "check the path")
        with path.open("rb") as file:
            head = file.read(256)
            if not head:
                raise ImagicError("is empty", "an image file", _REMEDY)
            image_format = _detect_format(head)
            if image_format is None:
                raise ImagicError("is not an image in a supported format", "an image file", _REMEDY)
            limit = _MAX_CODED.get(image_format, MAX_BYTES)
            data = head + file.read(limit + 1 - len(head)) if status.st_size <= limit else b""
    except (OSError, ValueError) as error:  # ValueError: the path is invalid
        why = getattr(error, "strerror", None) or error
        raise ImagicError(f"cannot be read ({why})", "an image file", "check the path") from error
    if not 0 < len(data) <= limit:
        raise ImagicError(f"is too large ({status.st_size} bytes)", f"at most {limit >> 20} MiB of {image_format}", "scale it down first")
    return image_format, data


def _detect_format(head: bytes) -> str | None:
    """Detects the format from the first bytes of a file; None if it is not supported."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        box = head[8 : int.from_bytes(head[:4], "big")]
        brands = {box[at : at + 4] for at in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF" if features.check("avif") else None
        return "HEIF" if brands & _HEIF_BRANDS else None
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class _LimitedReads(io.BytesIO):
    """A file in memory with a limited number of reads. A decoder loops over the parts of a file, and a malicious file has millions."""

    reads_left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _slow_error()
        return super().read(size)


def _slow_error() -> ImagicError:
    return ImagicError(
        "is stored in a way that takes too long to read", "an image file without unusual structure", "save it as PNG or JPEG"
    )


def _open_image(image_format: str, data: bytes) -> Image.Image:
    """Reads the header of an image and checks that the image is neither too large nor too slow to decode."""
    if image_format in ("AVIF", "HEIF"):  # boxes rotate these formats; EXIF and XMP repeat the rotation for programs that ignore the boxes
        data = re.sub(rb"(infe.{8,10}?)(Exif|mime)", rb"\1none", data, flags=re.DOTALL)
    if image_format == "HEIF":
        return _open_heif(data)
    if image_format in _CHECKS:
        _CHECKS[image_format](data)
    image = Image.open(_LimitedReads(data), formats=[image_format])
    _check_size(image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    if any(tile.codec_name in Image.DECODERS for tile in image.tile) and image.width * image.height > MAX_PIXELS // 8:
        raise _slow_error()  # these decoders are written in Python
    if "transparency" in image.info and any(tile.args == "RGB;16B" for tile in image.tile):  # Pillow would compare 8 bits of it only
        expected = "8 bits per channel, or an alpha channel"
        raise ImagicError("has a transparent colour of 16 bits", expected, "save it with 8 bits per channel or with an alpha channel")
    return image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        expected = f"at most {MAX_PIXELS // 10**6} megapixels, and {MAX_SIDE} pixels to a side"
        raise ImagicError(f"has {width}x{height} pixels", expected, "scale it down first")


def _check_jpeg(data: bytes) -> None:
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
    raise _slow_error()


def _check_png(data: bytes) -> None:
    """Rejects a PNG with many compressed chunks, each of which can decompress to a megabyte."""
    if sum(map(data.count, (b"iCCP", b"zTXt", b"iTXt"))) > _MAX_COMPRESSED_CHUNKS:
        raise _slow_error()


def _check_tiff_tags(data: bytes) -> None:
    """Rejects a TIFF file whose tags would fill the memory as Python numbers."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    table = struct.iter_unpack(f"{order}HHII", data[start + 2 : start + 2 + 12 * entries])
    if sum(count for _, tag_type, count, _ in table if tag_type not in _BYTE_TYPES) > _MAX_TAG_NUMBERS:
        raise _slow_error()


_CHECKS = {"JPEG": _check_jpeg, "PNG": _check_png, "TIFF": _check_tiff_tags}


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Rejects camera raw files, of which Pillow reads only a small preview, and tiles far larger than the image."""
    tags = image.tag_v2
    if tags.get(254, 0) & 1:
        raise ImagicError(
            "holds only a preview, like a camera raw file", "a developed photo", "export it as JPEG or TIFF from a raw converter"
        )
    if tags.get(322, 0) * tags.get(323, 0) > max(TILE_PIXELS, 4 * image.width * image.height):
        raise ValueError("its tiles are far larger than the image")
    image.is_animated = True  # makes load() skip nested directories, whose numbers may fill the memory too


def _open_heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        remedy = "pip install 'imagic-lora[heic]', or save it as JPEG"
        raise ImagicError("is a HEIC file, and the pillow-heif package is not installed", "the pillow-heif package", remedy) from error
    file = pillow_heif.open_heif(io.BytesIO(data))
    _check_size(file.size)
    return file.to_pillow()


def _orientation(image: Image.Image) -> Any:
    """The orientation in the EXIF data, or None. Like browsers, treats an image with unreadable EXIF as upright."""
    if len(image.info.get("exif") or b"") > _MAX_EXIF:
        raise ValueError("its EXIF is too large")
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
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
        metadata = json.loads(_open_image(image_format, data).info.get(METADATA_KEY, "null")) if image_format == "PNG" else None
        if not isinstance(metadata, dict):
            remedy = "use the original file: saving it again in another program removes the metadata"
            raise ImagicError("has no imagic-lora metadata", "a PNG written by imagic-lora edit", remedy)
        return metadata
