"""A rectangle of a photo."""

from __future__ import annotations

from typing import NamedTuple

from ..core.errors import ImagicError


class Region(NamedTuple):
    """A rectangle of a photo, in pixels of the upright photo.

    Args:
        x: distance of its left edge from that of the photo.
        y: distance of its top edge from that of the photo.
        width: at least 1.
        height: at least 1.
    """

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Region:
        """Returns the region of a whole photo.

        Args:
            size: width and height of the photo in pixels.
        """
        return cls(0, 0, *size)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The region as Pillow takes it: left, top, right, bottom."""
        return self.x, self.y, self.x + self.width, self.y + self.height

    def inside(self, size: tuple[int, int]) -> bool:
        """Returns whether the region has pixels, all of them in a photo of this width and height."""
        left, top, right, bottom = self.box
        return 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]

    def check_inside(self, size: tuple[int, int]) -> None:
        """Raises ImagicError if the region is not inside a photo of this width and height."""
        if not self.inside(size):
            width, height = size
            raise ImagicError(
                f"--region {self} of a photo of {width}x{height} pixels",
                f"X,Y,W,H with W and H of at least 1, X+W of at most {width} and Y+H of at most {height}",
                "change --region; it counts pixels of the upright photo from its top left corner",
            )

    def check_size(self, multiple: int) -> None:
        """Raises ImagicError if a side of the region is smaller than the size multiple of the base."""
        if min(self.size) < multiple:
            expected = f"at least {multiple}x{multiple} pixels, the smallest image of the base"
            raise ImagicError(f"--region {self} of {self.width}x{self.height} pixels", expected, "choose a larger --region")

    def __str__(self) -> str:
        return ",".join(map(str, self))


def parse_region(text: str) -> Region:
    """Parses a region of the photo, ``X,Y,W,H`` in pixels.

    Raises:
        ImagicError: the text is not four whole numbers.
    """
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        expected = "X,Y,W,H: four whole numbers, the left and top edge, the width and the height in pixels of the photo"
        raise ImagicError(f"--region {text}", expected, "use for example --region 1200,800,1024,1024") from error
    return Region(x, y, width, height)
