"""A photo in, tensors in [-1, 1], a PNG out."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import ImagicError

MAX_PIXELS = 100_000_000
METADATA_KEY = "imagic-lora"
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # JPEG opens MPO too
_REMEDY = "give a JPEG, PNG, WebP, TIFF, BMP or GIF file that other programs can open"


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

    Raises:
        ImagicError: no such file, empty, not an image of a known format, broken, or over 100 megapixels.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImagicError(f"{path} cannot be read ({error.strerror})", "an image file", "check the path") from error
    if not data:
        raise ImagicError(f"{path} is empty", "an image file", _REMEDY)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImagicError(f"{path} has {image.width}x{image.height} pixels", "at most 100 megapixels", "scale it down first")
            return Photo(_upright_rgb(image), hashlib.sha256(data).hexdigest())
    except UnidentifiedImageError as error:
        raise ImagicError(f"{path} is not an image of a known format", "an image file", _REMEDY) from error
    except Image.DecompressionBombError as error:
        raise ImagicError(f"{path} is too large ({error})", "at most 100 megapixels", "scale it down first") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImagicError(f"{path} is broken ({error})", "a whole image file", _REMEDY) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float pictures by their full range: 0 to 65535, or 0 to 1."""
    values = np.asarray(image, dtype=np.float64)
    most = values.max(initial=0)
    top = 1.0 if image.mode == "F" and most <= 1 else 65535.0 if image.mode.startswith("I;16") or most > 255 else 255.0
    return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """By the embedded profile; a profile that cannot be read or is of another colour space is passed over, as browsers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


@dataclass(frozen=True)
class Canvas:
    """A photo as the model sees it.

    Args:
        pixels: ``[1, 3, H, W]`` in [-1, 1]; H and W are multiples of what the base asks for.
        box: where the photo lies on it, ``(left, top, right, bottom)``; the rest repeats the edge.
        size: the photo's own ``(width, height)``.
    """

    pixels: Tensor
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def restored(self, picture: Image.Image) -> Image.Image:
        """A picture of the canvas's size, back at the photo's own size and shape."""
        picture = picture.crop(self.box)
        return picture if picture.size == self.size else picture.resize(self.size, Image.Resampling.LANCZOS)

    def photo(self) -> Image.Image:
        """The photo itself, as far as its pixels are still here."""
        return self.restored(to_image(self.pixels[0]))


def to_canvas(image: Image.Image, resolution: int, multiple: int) -> Canvas:
    """The photo scaled to an area of at most ``resolution`` squared, never squashed: what its shape lacks to whole multiples is padded.

    Args:
        image: RGB, any size and shape.
        resolution: in pixels.
        multiple: both sides of the canvas are multiples of it.
    """
    width, height = image.size
    scale = resolution / math.sqrt(width * height)
    wide = max(multiple, int(width * scale + 1e-6) // multiple * multiple)
    high = max(multiple, int(height * scale + 1e-6) // multiple * multiple)
    longest = max(multiple, resolution * resolution // multiple // multiple * multiple)  # the longest side of a very thin canvas
    wide, high = min(wide, longest), min(high, longest)
    scale = min(wide / width, high / height)
    inner = (max(1, min(wide, round(width * scale))), max(1, min(high, round(height * scale))))
    scaled = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS)
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    padded = np.pad(np.asarray(scaled), ((top, high - inner[1] - top), (left, wide - inner[0] - left), (0, 0)), mode="edge")
    return Canvas(to_pixels(Image.fromarray(padded)), (left, top, left + inner[0], top + inner[1]), image.size)


def to_pixels(image: Image.Image) -> Tensor:
    """A tensor ``[1, 3, H, W]`` in [-1, 1] of an RGB image; :func:`to_image` gives the image back exactly."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """An image of a tensor ``[3, H, W]`` in [-1, 1], rounded as diffusers does."""
    array = ((pixels.detach().cpu().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG that says how it was made, as JSON in its text chunk ``imagic-lora``."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    image.save(path, pnginfo=info)


def read_metadata(path: Path) -> dict[str, Any]:
    """What :func:`write_png` stored."""
    with Image.open(path) as image:
        return json.loads(image.info[METADATA_KEY])


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str = "", cell: int = 192) -> Image.Image:
    """Labelled pictures in rows, each scaled to fit a square cell without being squashed.

    Args:
        rows: of ``(label, picture)``.
        title: one line above them all.
        cell: side of a cell in pixels.
    """
    font, gap, label = ImageFont.load_default(15), 8, 24
    top = 34 if title else gap
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (gap + columns * (cell + gap), top + len(rows) * (cell + label + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), _fitting(title, font, page.width - 2 * gap), fill="black", font=font)
    for r, row in enumerate(rows):
        for c, (name, picture) in enumerate(row):
            x, y = gap + c * (cell + gap), top + r * (cell + label + gap)
            factor = min(cell / picture.width, cell / picture.height)
            size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
            kind = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
            page.paste(picture.resize(size, kind), (x + (cell - size[0]) // 2, y + label + (cell - size[1]) // 2))
            draw.text((x, y + 3), _fitting(name, font, cell), fill="black", font=font)
    return page


def _fitting(text: str, font: Any, width: int) -> str:
    """The text, or as much of its beginning as fits into a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
