"""Masks of what an edit may change: found from two images, or read from a file.

A mask is an image of mode L. White (255) is taken from the edit and black (0) from the photo. The gray in between blends the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.bool_]

_SIDE = 512
_LEAST = 10.0  # levels of 255; smaller differences are not visible as a change, and the VAE alone makes them
_SMALLEST = 0.003  # islands and holes below this share of the image are dropped


def reduced(image: Image.Image) -> Image.Image:
    """Returns an image at the size at which masks are found: an area of at most 512 x 512 pixels."""
    scale = min(1.0, _SIDE / math.sqrt(image.width * image.height))
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


def changed(edit: Image.Image, reference: Image.Image) -> Image.Image:
    """Returns the mask of what differs between an edit and the image at eta 0 with the same seed.

    The difference of each pixel is smoothed. Its threshold is half of the one that Otsu's method finds between changed and unchanged pixels
    (Otsu 1979), but at least 10 of 255 levels. Small islands and holes are dropped, gaps are closed, and the mask grows by twice the width
    of its feather: what the photo shows at the edge of what changed is sharper than the image at eta 0, and would remain as an outline.

    Args:
        edit: RGB.
        reference: the image at eta 0, RGB, :func:`reduced`.

    Returns:
        The mask in the size of the edit; black where nothing changed.
    """
    first, second = (np.asarray(image, dtype=np.float32) for image in (reduced(edit), reference))
    width = _feather(first.shape[:2])
    difference = _smoothed(np.sqrt(np.square(first - second).mean(axis=2)), width)
    mask = difference > max(_LEAST, _otsu(difference) / 2)
    smallest = _SMALLEST * mask.size
    mask = ~_without_islands(~_without_islands(mask, smallest), smallest)
    closed = _eroded(~_eroded(~mask, 4 * width), 2 * width)
    return feathered(closed).resize(edit.size, Image.Resampling.BILINEAR)


def feathered(mask: Pixels) -> Image.Image:
    """Returns a mask whose edge fades inwards over 1/64 of the side of a square of the same area, at least one pixel.

    What is False stays black. The edge of the image is no edge of the mask.

    Args:
        mask: what may change, ``[H, W]``.
    """
    width = _feather(mask.shape)
    depth = np.zeros(mask.shape, np.uint32)
    for smaller in islice(_erosions(mask), width + 1):
        depth += smaller
    return Image.fromarray((depth * 255 // (width + 1)).astype(np.uint8))


def softened(mask: Image.Image) -> Image.Image:
    """Returns a mask with a feathered edge. Its own gray stays, and its black stays black.

    Args:
        mask: of mode L.
    """
    gray = np.asarray(mask, dtype=np.uint16)
    feather = np.asarray(feathered(gray > 0), dtype=np.uint16)
    return Image.fromarray(((gray * feather + 127) // 255).astype(np.uint8))


def _feather(size: tuple[int, ...]) -> int:
    """Width of a feather in an image of this size, in pixels."""
    return max(1, round(math.sqrt(math.prod(size)) / 64))


def _smoothed(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """A Gaussian filter of this standard deviation in pixels; the edge repeats."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2).astype(np.float32)
    for _ in range(2):  # along one axis, then along the other
        padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
        values = (sliding_window_view(padded, len(kernel), axis=0) @ (kernel / kernel.sum())).T
    return values


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold in [0, 255] with the greatest variance between the values below it and those above it (Otsu 1979)."""
    counts, edges = np.histogram(values, 256, (0, 255))
    sums = (counts * (edges[:-1] + edges[1:]) / 2).cumsum()
    below = counts.cumsum()
    above = values.size - below
    means = sums / below.clip(1), (sums[-1] - sums) / above.clip(1)
    return float(edges[1 + int((below * above * np.square(means[0] - means[1])).argmax())])


def _eroded(mask: Pixels, steps: int) -> Pixels:
    """A mask without the pixels up to this many from its edge."""
    return next(islice(_erosions(mask), steps, None))


def _erosions(mask: Pixels) -> Iterator[Pixels]:
    """Yields a mask, then the same without the pixels at its edge, and so on. Beyond the image the mask continues.

    Every other time a diagonal neighbour outside of the mask counts too, so that corners are cut to octagons.
    """
    for diagonal in cycle((False, True)):
        yield mask
        padded = np.pad(mask, 1, constant_values=True)
        down = padded[:-2] & padded[1:-1] & padded[2:]
        mask = down[:, :-2] & down[:, 1:-1] & down[:, 2:] if diagonal else down[:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _without_islands(mask: Pixels, smallest: float) -> Pixels:
    """A mask without its islands (pixels connected by their sides) of fewer pixels than the smallest and than a quarter of the largest."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    islands = _connected(rows.tolist(), starts.tolist(), ends.tolist())
    sizes = np.bincount(islands, ends - starts)
    kept = sizes[islands] >= min(smallest, sizes.max(initial=0) / 4)
    edges = np.zeros_like(edges)
    edges[rows[kept], starts[kept]] = 1
    edges[rows[kept], ends[kept]] = -1
    return edges.cumsum(axis=1)[:, :-1] == 1


def _connected(rows: list[int], starts: list[int], ends: list[int]) -> NDArray[np.intp]:
    """The island of each run of pixels ``[start, end)`` in a row, by the number of one of its runs. Runs are sorted by row and start."""
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    upper = 0  # the first run that may touch this run or a later one from the row above
    for run, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        while (rows[upper], ends[upper]) <= (row - 1, start):
            upper += 1
        touching = upper
        while rows[touching] == row - 1 and starts[touching] < end:
            parents[root(touching)] = root(run)
            touching += 1
    return np.array([root(run) for run in range(len(rows))], np.intp)
