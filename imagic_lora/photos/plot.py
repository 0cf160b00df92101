"""Line plots, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .sheet import fitting

COLOURS = ("#1f6fb4", "#d1571b", "#2a9d4a", "#8a4fbf", "#c8432f", "#777777")
"""Colours of the curves, in their order."""
SCALE = 3
"""Plots are drawn larger by this factor and scaled down: Pillow's lines are not antialiased."""
_MARGINS = (64, 40, 20, 48)  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Curve:
    """A curve of a plot.

    Args:
        name: its name in the legend; none if empty.
        points: ``(x, y)``, x ascending.
        spread: ``(x, lowest y, highest y)``, drawn as a pale area; may be empty.
        colour: a colour of Pillow; None for the next of :data:`COLOURS`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float, float]] = ()
    colour: str | None = None


@dataclass(frozen=True)
class Mark:
    """A range of x that is shaded, or one x with a dashed line.

    Args:
        name: its name in the legend.
        start, end: the range; equal for a line.
    """

    name: str
    start: float
    end: float


def plot(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    title: str = "",
    marks: Sequence[Mark] = (),
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (760, 420),
) -> Image.Image:
    """Draws curves over one x axis, with ticks, a legend and marked ranges.

    Args:
        curves: at least one, each with at least one point; all numbers are finite.
        x_label, y_label: text at the axes.
        title: one line above the plot.
        marks: ranges and lines.
        y_range: lowest and highest y of the axis; None for the range of the curves.
        size: width and height in pixels.
    """
    area = _Area(curves, y_range, size)
    page = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(page, "RGBA")
    bottom, top = area.y(area.low), area.y(area.high)
    for mark in marks:
        if mark.end > mark.start:
            draw.rectangle((area.x(mark.start), top, area.x(mark.end), bottom), fill="#2a9d4a26")
    _draw_axes(draw, area, x_label, y_label, title)
    for mark in marks:
        if mark.end <= mark.start:
            dashed(draw, (area.x(mark.start), top), (area.x(mark.start), bottom))
    legend: list[tuple[str, str]] = []
    for k, curve in enumerate(curves):
        colour = curve.colour or COLOURS[k % len(COLOURS)]
        if curve.spread:
            outline = [(x, low) for x, low, _ in curve.spread] + [(x, high) for x, _, high in reversed(curve.spread)]
            draw.polygon([(area.x(x), area.y(y)) for x, y in outline], fill=f"{colour}26")
        points = [(area.x(x), area.y(y)) for x, y in curve.points]
        draw.line(points, fill=colour, width=2 * SCALE, joint="curve")
        if len(points) <= 40:
            for x, y in points:
                draw.circle((x, y), 3 * SCALE, fill=colour)
        legend += [(curve.name, colour)] if curve.name else []
    legend += [(mark.name, "#2a9d4a" if mark.end > mark.start else "#222222") for mark in marks]
    _draw_legend(draw, area, legend)
    return page.resize(size, Image.Resampling.LANCZOS)


class _Area:
    """The mapping from numbers to pixels of the enlarged page.

    Args:
        curves, y_range, size: as for :func:`plot`.
    """

    def __init__(self, curves: Sequence[Curve], y_range: tuple[float, float] | None, size: tuple[int, int]) -> None:
        left, top, right, bottom = _MARGINS
        self.box = (left * SCALE, top * SCALE, (size[0] - right) * SCALE, (size[1] - bottom) * SCALE)
        xs = [x for curve in curves for x, _ in curve.points]
        ys = [y for curve in curves for y in (*(y for _, y in curve.points), *(y for _, *both in curve.spread for y in both))]
        self.first, self.last = _widened(min(xs), max(xs))
        self.low, self.high = _widened(*(y_range or (min(ys), max(ys))))

    def x(self, value: float) -> float:
        """Horizontal position of a number."""
        return self.box[0] + (value - self.first) / (self.last - self.first) * (self.box[2] - self.box[0])

    def y(self, value: float) -> float:
        """Vertical position of a number, within the plot."""
        share = (value - self.low) / (self.high - self.low)
        return self.box[3] - min(max(share, 0.0), 1.0) * (self.box[3] - self.box[1])


def ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Returns round numbers in a range: multiples of 1, 2 or 5 times a power of ten, at most ``count`` steps apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around a single number."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _draw_axes(draw: ImageDraw.ImageDraw, area: _Area, x_label: str, y_label: str, title: str) -> None:
    """Draws grid, ticks, labels and title."""
    font, (left, top, right, bottom) = ImageFont.load_default(12 * SCALE), area.box
    for value in ticks(area.low, area.high, 6):
        draw.line((left, area.y(value), right, area.y(value)), fill="#dddddd", width=SCALE)
        draw.text((left - 6 * SCALE, area.y(value)), f"{value:g}", fill="#555555", font=font, anchor="rm")
    for value in ticks(area.first, area.last, 14):
        draw.line((area.x(value), bottom, area.x(value), bottom + 4 * SCALE), fill="#555555", width=SCALE)
        draw.text((area.x(value), bottom + 7 * SCALE), f"{value:g}", fill="#555555", font=font, anchor="mt")
    draw.line((left, bottom, right, bottom), fill="#555555", width=SCALE)
    draw.text(((left + right) / 2, bottom + 26 * SCALE), x_label, fill="#222222", font=font, anchor="mt")
    draw.text((left - 56 * SCALE, top - 8 * SCALE), y_label, fill="#222222", font=font, anchor="lb")
    draw.text(((left + right) / 2, 6 * SCALE), fitting(title, font, right - left), fill="#222222", font=font, anchor="mt")


def _draw_legend(draw: ImageDraw.ImageDraw, area: _Area, entries: Sequence[tuple[str, str]]) -> None:
    """Draws the names of curves and marks in one line above the plot, from the right."""
    font, x = ImageFont.load_default(12 * SCALE), area.box[2]
    for name, colour in reversed(entries):
        x -= font.getlength(name)
        draw.text((x, area.box[1] - 8 * SCALE), name, fill=colour, font=font, anchor="lb")
        x -= 16 * SCALE


def dashed(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws a dashed line, horizontal or vertical, from left to right or from top to bottom."""
    (x, y), (right, bottom) = start, end
    dash, period = 6 * SCALE, 11 * SCALE
    while x < right or y < bottom:
        draw.line((x, y, min(x + dash, right), min(y + dash, bottom)), fill="#222222", width=2 * SCALE)
        x, y = min(x + period, right), min(y + period, bottom)
