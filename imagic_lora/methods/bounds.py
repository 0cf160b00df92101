"""What no method should be below, and what none can be above."""

from __future__ import annotations

from collections.abc import Iterator

from ..photos.canvas import to_image, to_pixels
from .method import Context, Cost, EditRequest, EditResult, Method


class Bounds(Method):
    """``copy`` is the photo itself; ``oracle`` is the true edit, as far as the base's VAE can show it."""

    name = "bounds"
    rows = ("copy", "oracle")

    def __init__(self) -> None:
        self.settings = {}

    def pictures(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        yield EditResult("copy", request.photo, Cost())
        shown = context.base.decode(context.base.encode_image(to_pixels(request.truth)))
        yield EditResult("oracle", to_image(shown[0]), Cost())
