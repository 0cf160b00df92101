"""The sheet and the plot of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...core.text import exact
from ...photos.canvas import Canvas
from ...photos.plot import Curve, Mark, plot
from ...photos.sheet import sheet
from .suggest import Curves
from .sweep import Picture, Scores


def draw_sheet(canvas: Canvas, prompt: str, pictures: Sequence[Picture], suggested: float) -> Image.Image:
    """Arranges the images of a sweep: one row for each seed, the photo first, and the rows of the untuned base above the others.

    Args:
        canvas: the canvas of the photo.
        prompt: the target prompt.
        pictures: the images, by ascending eta for each seed.
        suggested: the suggested eta, for the title.
    """
    photo = canvas.photo()
    rows: dict[tuple[bool, int], list[tuple[str, Image.Image]]] = {}
    for picture in sorted(pictures, key=lambda picture: picture.tuned):  # stable: False first
        label = f"eta {exact(picture.eta)} " + (f"seed {picture.seed}" if picture.tuned else "before tuning")
        row = rows.setdefault((picture.tuned, picture.seed), [("photo", photo)])
        row.append((label, picture.image.crop(canvas.box)))
    return sheet(list(rows.values()), f'"{prompt}", suggested eta {exact(suggested)}')


def draw_plot(prompt: str, scores: Sequence[Scores], suggested: float, good: tuple[float, float] | None) -> Image.Image:
    """Plots alignment and fidelity over eta, with their range over the seeds: Figure 9 of Imagic for one photo.

    Args:
        prompt: the target prompt.
        scores: the scores of all images; those of the untuned base are left out.
        suggested: the suggested eta.
        good: the etas where both are good, or None.
    """
    tuned = [score for score in scores if score.tuned]
    mean = Curves.of(tuned)
    seeds = [Curves.of(score for score in tuned if score.seed == seed) for seed in {score.seed for score in tuned}]

    def curve(name: str) -> Curve:
        values = zip(*(getattr(one, name) for one in seeds), strict=True)
        spread = [(eta, min(each), max(each)) for eta, each in zip(mean.etas, values, strict=True)]
        return Curve(name, list(zip(mean.etas, getattr(mean, name), strict=True)), spread)

    marks = [Mark("both good", *good)] if good else []
    marks.append(Mark(f"suggested {exact(suggested)}", suggested, suggested))
    return plot([curve("alignment"), curve("fidelity")], "eta", "", f'"{prompt}"', marks, (0.0, 1.0))
