"""Plots and bar charts: numbers at their places."""

from __future__ import annotations

import numpy as np
import pytest
from common import each

from imagic_lora.photos.bars import Bar, bars
from imagic_lora.photos.plot import Curve, Mark, plot, ticks

LEFT, TOP, RIGHT, BOTTOM = 64, 40, 760 - 20, 420 - 48  # of the area of the curves


@each(
    "low, high, count, expected",
    [
        (0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1.2, 14, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2]),
        (-3.5, 42, 6, [0, 10, 20, 30, 40]),
        (0.0012, 0.0019, 4, [0.0012, 0.0014, 0.0016, 0.0018]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, expected: list[float]) -> None:
    """At most that many steps, all in the range."""
    assert ticks(low, high, count) == pytest.approx(expected)


def test_a_curve_passes_through_its_points() -> None:
    """Two corners and the middle are in its colour, and nothing beside them is."""
    page = np.asarray(plot([Curve("", [(0, 0), (1, 10)], colour="#ff0000")], "x", "y")).astype(int)
    red = (page[..., 0] > 200) & (page[..., 1] < 90)
    for x, y in ((LEFT, BOTTOM), ((LEFT + RIGHT) // 2, (TOP + BOTTOM) // 2), (RIGHT - 1, TOP)):
        assert red[y - 2 : y + 3, x - 2 : x + 3].any()
    assert not red[: TOP - 5].any()
    assert not red[:, : LEFT - 5].any()
    assert not red[TOP + 100, : LEFT + 300].any()


def test_a_mark_covers_its_range() -> None:
    """A range is shaded from its start to its end; values outside the axis stay at its edge; one point needs no range."""
    curves = [Curve("low", [(0, -9), (1, -9)], spread=[(0, -9, -9), (1, -9, -9)])]
    plain, marked = (np.asarray(plot(curves, "x", "y", "t", marks, (0, 1))) for marks in ((), [Mark("", 0.25, 0.5)]))
    columns = np.flatnonzero((plain != marked)[200].any(1))
    width = RIGHT - LEFT
    assert (columns[0], columns[-1]) == pytest.approx((LEFT + width / 4, LEFT + width / 2), abs=1.5)
    line = np.asarray(plot(curves, "x", "y", "t", [Mark("", 0.5, 0.5)], (0, 1)))
    dark = np.flatnonzero((line.max(2) < 90)[TOP + 3, LEFT:])
    assert dark.mean() == pytest.approx(width / 2, abs=1.5)
    assert plot([Curve("one", [(3, 4)])], "x", "y").size == (760, 420)


def test_a_bar_ends_at_its_value_and_a_whisker_at_its_interval() -> None:
    """Three columns of 130 pixels; the first bar is 75%, its interval 60 to 90%, the second has neither, the third is 0."""
    page = np.asarray(bars([Bar("a", 0.75, [(0.6, 0.9)]), Bar("b", None, [None]), Bar("c", 0.0)], "t", "%", ["95%"])).astype(int)
    top, bottom = 66, 420 - 64
    blue = (page[..., 2] > 150) & (page[..., 0] < 60)
    filled = np.flatnonzero(blue[:, LEFT + 65 - 25])
    assert (filled[0], filled[-1]) == pytest.approx((bottom - 0.75 * (bottom - top), bottom), abs=2)
    dark = np.flatnonzero((page.max(2) < 90)[top : bottom - 20, LEFT + 65]) + top
    assert (dark[0], dark[-1]) == pytest.approx((bottom - 0.9 * (bottom - top), bottom - 0.6 * (bottom - top)), abs=3)
    assert not blue[:, LEFT + 130 :].any()
