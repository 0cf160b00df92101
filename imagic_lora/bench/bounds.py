"""Reference rows of a benchmark: the unedited photo and the true edit. They are no methods: they know the true edit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from ..methods.method import Context, Cost, EditRequest, EditResult
from ..photos.canvas import to_image, to_pixels


class Bounds:
    """Yields the photo as row ``copy``, and the true edit, encoded and decoded by the VAE of the base, as row ``oracle``.

    ``copy`` is the score of a method that changes nothing. ``oracle`` is the upper bound for methods that decode latents of the base.
    """

    name = "bounds"
    rows = ("copy", "oracle")
    settings: dict[str, Any] = {}  # noqa: RUF012

    def edit(self, context: Context, request: EditRequest, truth: Image.Image) -> Iterator[EditResult]:
        """Yields both rows, at no cost.

        Args:
            context: what all methods of a run share.
            request: the request that the methods get.
            truth: the true edit, RGB, of the size of an image of the base.
        """
        yield EditResult("copy", request.photo, Cost())
        decoded = context.base.decode(context.base.encode_image(to_pixels(truth)))
        yield EditResult("oracle", to_image(decoded[0]), Cost())
