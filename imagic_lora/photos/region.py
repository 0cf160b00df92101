"""A rectangle of a photo."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

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

    def cropped(self, photo: Image.Image, multiple: int) -> Image.Image:
        """Returns the region of a photo.

        Args:
            photo: RGB, upright.
            multiple: smallest width and height of a region, in pixels: the size multiple of the base.

        Raises:
            ImagicError: the region is not inside the photo, or smaller than the multiple.
        """
        if not self.inside(photo.size):
            raise ImagicError(
                f"--region {self} of a photo of {photo.width}x{photo.height} pixels",
                f"X,Y,W,H with X+W of at most {photo.width} and Y+H of at most {photo.height}",
                "change --region; it counts pixels of the upright photo from its top left corner",
            )
        if min(self.size) < multiple:
            raise ImagicError(
                f"--region {self} of {self.width}x{self.height} pixels",
                f"at least {multiple}x{multiple} pixels, the smallest image of the base",
                "choose a larger --region",
            )
        return photo.crop(self.box)

    def __str__(self) -> str:
        return ",".join(map(str, self))
