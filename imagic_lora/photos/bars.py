"""Bar charts, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .plot import COLOURS, SCALE, dashed, ticks
from .sheet import fitting

_COLUMN, _HEIGHT = 130, 420  # of a bar with the space around it, and of the chart, in pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 66, 20, 64
_WHISKER_COLOURS = ("#222222", "#8a4fbf")


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Args:
        name: the text below it.
        value: its height, 0 to 1; None where there is none.
        intervals: lowest and highest value of each interval, drawn as whiskers beside each other; None draws no whisker.
        note: a second, pale line of text below it.
    """

    name: str
    value: float | None
    intervals: Sequence[tuple[float, float] | None] = ()
    note: str = ""


def bars(chart: Sequence[Bar], title: str, y_label: str, intervals: Sequence[str] = ()) -> Image.Image:
    """Draws bars of shares, from 0 to 100%, with a dashed line at one half.

    Args:
        chart: at least one bar.
        title: one line above the chart.
        y_label: text at the axis.
        intervals: names of the intervals, in their order, for the legend.
    """
    size = (_LEFT + _RIGHT + max(3, len(chart)) * _COLUMN, _HEIGHT)
    page = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12 * SCALE)
    left, top, right, bottom = (edge * SCALE for edge in (_LEFT, _TOP, size[0] - _RIGHT, size[1] - _BOTTOM))

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    for share in ticks(0, 1, 5):
        draw.line((left, y(share), right, y(share)), fill="#dddddd", width=SCALE)
        draw.text((left - 6 * SCALE, y(share)), f"{100 * share:g}", fill="#555555", font=font, anchor="rm")
    draw.text((left - 56 * SCALE, top - 8 * SCALE), y_label, fill="#222222", font=font, anchor="lb")
    draw.text(((left + right) / 2, 8 * SCALE), fitting(title, font, size[0] * SCALE - 16 * SCALE), fill="#222222", font=font, anchor="mt")
    step = (right - left) / len(chart)
    for k, bar in enumerate(chart):
        centre, width = left + (k + 0.5) * step, int(step - 10 * SCALE)
        if bar.value is not None:
            draw.rectangle((centre - 32 * SCALE, y(bar.value), centre + 32 * SCALE, bottom), fill=COLOURS[0])
            draw.text((centre, bottom - 6 * SCALE), f"{100 * bar.value:.0f}", fill="white", font=font, anchor="mb")
        drawn = [(place, interval) for place, interval in enumerate(bar.intervals) if interval is not None]
        for place, (low, high) in drawn:
            x = centre + (place - (len(bar.intervals) - 1) / 2) * 22 * SCALE
            _whisker(draw, x, y(low), y(high), _WHISKER_COLOURS[place % len(_WHISKER_COLOURS)])
        draw.text((centre, bottom + 8 * SCALE), fitting(bar.name, font, width), fill="#222222", font=font, anchor="mt")
        draw.text((centre, bottom + 26 * SCALE), fitting(bar.note, font, width), fill="#555555", font=font, anchor="mt")
    draw.line((left, bottom, right, bottom), fill="#555555", width=SCALE)
    dashed(draw, (left, y(0.5)), (right, y(0.5)))
    end = right
    for name, colour in reversed(list(zip(intervals, _WHISKER_COLOURS, strict=False))):
        draw.text((end, top - 8 * SCALE), name, fill=colour, font=font, anchor="rb")
        end -= font.getlength(name) + 16 * SCALE
    return page.resize(size, Image.Resampling.LANCZOS)


def _whisker(draw: ImageDraw.ImageDraw, x: float, low: float, high: float, colour: str) -> None:
    """Draws an interval with caps; a white outline keeps it visible on the bar."""
    for fill, width in (("white", 5 * SCALE), (colour, 2 * SCALE)):
        draw.line((x, low, x, high), fill=fill, width=width)
        for end in (low, high):
            draw.line((x - 6 * SCALE, end, x + 6 * SCALE, end), fill=fill, width=width)
