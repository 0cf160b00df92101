"""Sheets of labelled images."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str = "", cell: int = 192) -> Image.Image:
    """Arranges labelled images in rows, each scaled to fit a square cell. Aspect ratios are kept.

    Args:
        rows: rows of ``(label, image)``.
        title: one line above the rows; none if empty.
        cell: side of a cell in pixels.
    """
    font, gap, label = ImageFont.load_default(15), 8, 24
    top = 34 if title else gap
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (gap + columns * (cell + gap), top + len(rows) * (cell + label + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), fitting(title, font, page.width - 2 * gap), fill="black", font=font)
    for r, row in enumerate(rows):
        for c, (name, image) in enumerate(row):
            x, y = gap + c * (cell + gap), top + r * (cell + label + gap)
            factor = min(cell / image.width, cell / image.height)
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            resampling = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
            page.paste(image.resize(size, resampling), (x + (cell - size[0]) // 2, y + label + (cell - size[1]) // 2))
            draw.text((x, y + 3), fitting(name, font, cell), fill="black", font=font)
    return page


def fitting(text: str, font: Any, width: int) -> str:
    """Shortens a text to a width in pixels; a shortened text ends with ``...``."""
    short = text[: width + 1]  # the time to measure grows with the length, and hardly any letter is narrower than a pixel
    if short == text and font.getlength(text) <= width:
        return text
    return short[: bisect_left(range(1, len(short) + 1), True, key=lambda count: font.getlength(short[:count] + "...") > width)] + "..."
