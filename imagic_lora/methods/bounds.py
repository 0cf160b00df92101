"""Reference rows of a benchmark: the unedited photo and the true edit."""

from __future__ import annotations

from collections.abc import Iterator

from ..photos.canvas import to_image, to_pixels
from .method import Context, Cost, EditRequest, EditResult, Method


class Bounds(Method):
    """Yields the photo as row ``copy``, and the true edit, encoded and decoded by the VAE of the base, as row ``oracle``.

    ``copy`` is the score of a method that changes nothing. ``oracle`` is the upper bound for methods that decode latents of the base.
    """

    name = "bounds"
    rows = ("copy", "oracle")

    def __init__(self) -> None:
        self.settings = {}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        yield EditResult("copy", request.photo, Cost())
        decoded = context.base.decode(context.base.encode_image(to_pixels(request.truth)))
        yield EditResult("oracle", to_image(decoded[0]), Cost())
