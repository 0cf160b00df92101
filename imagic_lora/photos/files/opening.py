"""Opening an image: its header is read, and it is checked that the image is neither too large nor too slow to decode."""

from __future__ import annotations

import io
import re
import struct

from PIL import Image, TiffImagePlugin

from ...core.errors import ImagicError
from ..colour.conversion import TILE_PIXELS

MAX_PIXELS = 50_000_000  # read in less than 5 s on one core and in 1.5 GB, in every format
MAX_SIDE = 1_000_000  # pixels; Lanczos resampling needs 48 bytes for each pixel of a side
_MAX_READS = 500_000
_MAX_SCANS = 100  # of a JPEG
_MAX_JPEG_EXIF = 16  # segments
_MAX_COMPRESSED_CHUNKS = 500  # of a PNG
_MAX_TAG_NUMBERS = 2**18  # in the tags of a TIFF file
_BYTE_TYPES = (1, 2, 7)  # of TIFF tags: BYTE, ASCII and UNDEFINED, which Pillow keeps as bytes
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # start of a segment of a JPEG


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


def open_image(image_format: str, data: bytes) -> Image.Image:
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
