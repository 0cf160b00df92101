"""PNG files with metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

METADATA_KEY = "imagic-lora"


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None, parameters: str = "") -> None:
    """Writes an image and its metadata to a PNG file, see :func:`png`."""
    path.write_bytes(png(image, metadata, parameters))


def png(image: Image.Image, metadata: Mapping[str, Any] | None, parameters: str = "") -> bytes:
    """Encodes an image as PNG.

    Args:
        image: the image.
        metadata: written as JSON into the text chunk ``imagic-lora``; None writes no such chunk.
        parameters: content of the text chunk ``parameters``, which A1111 and other programs read; empty writes no such chunk.
    """
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if metadata is not None:
        info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    if parameters:
        info.add_text("parameters", parameters)
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()
