"""Every measure by name: its model, its preprocessing, which way is better, and its scale in tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .sources import CLIPS, LPIPS, PIXELS, Sources

Region = Literal["whole", "background", "edited"]
REGIONS: tuple[Region, ...] = ("whole", "background", "edited")


@dataclass(frozen=True)
class Measure:
    """A measure of the evaluator.

    Args:
        name: its key in the results.
        title: its heading in tables, with its scale.
        metric: what it belongs to, one of ``METRICS``.
        region: which part of the picture it is about.
        better: whether more or less is better.
        scale: factor of the values in tables.
        decimals: digits after the point in tables.
        preprocessing: what is done to the pictures, and how values are made.
    """

    name: str
    title: str
    metric: str
    region: Region
    better: Literal["higher", "lower"]
    scale: float
    decimals: int
    preprocessing: str


def measures(sources: Sources, size: int, as_published: bool) -> list[Measure]:
    """Returns the measures of an evaluator, those of a whole picture first.

    Args:
        sources: the metrics.
        size: side of the square that pictures are scaled to, in pixels.
        as_published: whether regions are treated as published by PIE-Bench.
    """
    found = [measure for metric in sources.metrics for measure in _measures_of(metric, size, as_published)]
    return sorted(found, key=lambda measure: REGIONS.index(measure.region))


def square(size: int) -> str:
    """What is done to every picture, in words."""
    return f"RGB, centre square, bicubic to {size} x {size}"


def _measures_of(metric: str, size: int, as_published: bool) -> Iterator[Measure]:
    if metric == PIXELS:
        for region in REGIONS:
            how = f"{square(size)}; values in [0, 1]{_region(region, as_published)}"
            yield Measure(_name("psnr", region), "PSNR dB", metric, region, "higher", 1, 2, f"{how}; at most 100 dB")
            yield Measure(_name("ssim", region), "SSIM x100", metric, region, "higher", 100, 2, f"{how}; Gaussian window of 11 pixels")
            yield Measure(_name("mse", region), "MSE x10^4", metric, region, "lower", 1e4, 2, how)
    elif metric in LPIPS:
        for region in REGIONS:
            how = f"{square(size)}; values in [-1, 1]{_region(region, as_published)}"
            title = f"LPIPS {metric.removeprefix('lpips-')} x10^3"
            yield Measure(_name(metric.replace("-", "_"), region), title, metric, region, "lower", 1000, 2, how)
    elif metric in CLIPS:
        key, net = metric.replace("-", "_"), metric.removeprefix("clip-").upper()
        own = "the picture at its own size by the model's own processor"
        floor = "; cosine, below 0 as 0" if as_published else "; cosine"
        text = f"{own}{floor} with the target prompt"
        yield Measure(key, f"CLIP {net} x100", metric, "whole", "higher", 100, 2, text)
        change = f"{own}; cosine of the change from the source with the change from the source prompt to the target prompt"
        yield Measure(f"{key}_direction", f"direction {net} x100", metric, "whole", "higher", 100, 2, change)
        yield Measure(f"{key}_image", f"CLIP-I {net} x100", metric, "whole", "higher", 100, 2, f"{own}; cosine with the source")
        border = ", the border of the picture counted as mask" if as_published else ""
        region = f"{square(size)}; black outside of the mask{border}; the model's own processor{floor} with the target prompt"
        yield Measure(f"{key}_edited", f"CLIP {net} x100", metric, "edited", "higher", 100, 2, region)
    else:
        levels = "0 to 255 normalised as if they were 0 to 1, bilinear without antialiasing" if as_published else "0 to 1, bilinear"
        how = f"{square(size)}; values of {levels} to the network's size; keys of the last layer"
        yield Measure("structure", "structure x10^3", metric, "whole", "lower", 1000, 2, how)


def _name(name: str, region: Region) -> str:
    return name if region == "whole" else f"{name}_{region}"


def _region(region: Region, as_published: bool) -> str:
    if region == "whole":
        return ""
    place = "outside" if region == "edited" else "inside"
    if as_published:
        return f"; black {place} of the mask, to which the border of the picture is added; mean over all pixels of the picture"
    return f"; black {place} of the mask; mean over the other pixels"
