"""What no method should be below, and what none can be above."""

from __future__ import annotations

from collections.abc import Iterator

from ..photos.canvas import to_image, to_pixels
from .method import Made, Method, Price, Studio, Task


class Bounds(Method):
    """``copy`` is the photo itself; ``oracle`` is the true edit, as far as the base's VAE can show it."""

    name = "bounds"
    rows = ("copy", "oracle")

    def __init__(self) -> None:
        self.settings = {}

    def pictures(self, studio: Studio, task: Task) -> Iterator[Made]:
        yield Made("copy", task.photo, Price())
        shown = studio.base.decode(studio.base.encode_image(to_pixels(task.truth)))
        yield Made("oracle", to_image(shown[0]), Price())
