"""PNG files with metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

METADATA_KEY = "imagic-lora"


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes an image and its metadata to a PNG file, see :func:`png`."""
    path.write_bytes(png(image, metadata))


def png(image: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    """Encodes an image as PNG, with the metadata as JSON in the text chunk ``imagic-lora``."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()
