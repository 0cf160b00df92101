"""Opening an image: its header is read, and it is checked that the image is neither too large nor too slow to decode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ...core.errors import ImagicError
from ..colour.conversion import TILE_PIXELS
from .checks import check_aperture, check_gif, check_jpeg, check_png, check_tiff, slow_error, unknown_pixels

MAX_PIXELS = 50_000_000  # read in less than 5 s on one core and in 1.5 GB, in every format
MAX_SIDE = 1_000_000  # pixels; Lanczos resampling needs 48 bytes for each pixel of a side
_MAX_READS = 500_000


class _LimitedReads(io.BytesIO):
    """A file in memory with a limited number of reads. A decoder loops over the parts of a file, and a malicious file has millions."""

    reads_left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise slow_error()
        return super().read(size)


_CHECKS = {"GIF": check_gif, "JPEG": check_jpeg, "PNG": check_png, "TIFF": check_tiff}
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {  # Image.open() would hide what is wrong with a file
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}


def open_image(image_format: str, data: bytes) -> Image.Image:
    """Reads the header of an image and checks that its pixels can be read correctly, are not too many, and do not take too long.

    Raises:
        ImagicError: the image is too large, too slow to decode, or says what is not supported.
    """
    if image_format in ("AVIF", "HEIF"):  # boxes rotate these formats; EXIF and XMP repeat the rotation for programs that ignore the boxes
        data = re.sub(rb"(infe.{8,10}?)(Exif|mime)", rb"\1none", data, flags=re.DOTALL)
    if image_format == "HEIF":
        return _open_heif(data)
    if image_format in _CHECKS:
        _CHECKS[image_format](data)
    try:
        image = _OPENERS[image_format](_LimitedReads(data))
    except SyntaxError as error:
        if image_format == "TIFF" and str(error) == "unknown pixel mode":
            raise unknown_pixels(data) from error
        raise
    _check_size(image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiles(image)
    if image_format == "AVIF":
        check_aperture(data, image.size)
    if any(tile.codec_name in Image.DECODERS for tile in image.tile) and image.width * image.height > MAX_PIXELS // 8:
        raise slow_error()  # these decoders are written in Python
    return image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        expected = f"at most {MAX_PIXELS // 10**6} megapixels, and {MAX_SIDE} pixels to a side"
        raise ImagicError(f"has {width}x{height} pixels", expected, "scale it down first")


def _check_tiles(image: TiffImagePlugin.TiffImageFile) -> None:
    """Rejects tiles far larger than the image."""
    if image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0) > max(TILE_PIXELS, 4 * image.width * image.height):
        raise ValueError("its tiles are far larger than the image")
    image.is_animated = True  # makes load() skip nested directories, whose numbers may fill the memory


def _open_heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        remedy = "pip install 'imagic-lora[heic]', or save it as JPEG"
        raise ImagicError("is a HEIC file, and the pillow-heif package is not installed", "the pillow-heif package", remedy) from error
    file = pillow_heif.open_heif(io.BytesIO(data))
    _check_size(file.size)
    return file.to_pillow()
