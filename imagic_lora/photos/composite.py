"""Edits pasted into the photo at its full size. What is not pasted stays byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, ImageChops

from ..core.errors import ImagicError
from .mask import changed, softened
from .region import Region


@dataclass(frozen=True)
class Composite:
    """A photo, and where edits may change it.

    Args:
        photo: the whole photo as :func:`~imagic_lora.photos.reading.read_photo` reads it.
        region: the part that was edited.
        limit: mask of what may change in the region, mode L, of the region's size. Masks of single edits are within it.
    """

    photo: Image.Image
    region: Region
    limit: Image.Image

    @classmethod
    def of(cls, photo: Image.Image, region: Region | None = None, mask: Image.Image | None = None) -> Self:
        """Returns a composite whose seams are feathered: the edge of the mask, and the edges of the region inside the photo.

        Args:
            photo: the whole photo, RGB.
            region: the part that was edited; None is all of it.
            mask: what may change, mode L, of the photo's size; None is everything in the region.

        Raises:
            ImagicError: nothing in the region may change.
        """
        region = region or Region.whole(photo.size)
        inside = np.full(region.size[::-1], 255, np.uint8) if mask is None else np.asarray(mask.crop(region.box))
        left, top, right, bottom = region.box
        at_border = ((top == 0, bottom == photo.height), (left == 0, right == photo.width))
        outside = np.pad(inside, 1, mode="edge")
        for axis, sides in enumerate(at_border):
            for end, border in zip((0, -1), sides, strict=True):
                if not border:
                    outside.swapaxes(0, axis)[end] = 0
        limit = softened(Image.fromarray(outside)).crop((1, 1, region.width + 1, region.height + 1))
        if limit.getbbox() is None:
            raise ImagicError(f"the mask is black in the whole region {region}", "white pixels in the region", "use another mask")
        return cls(photo, region, limit)

    def changed(self, edit: Image.Image, reference: Image.Image) -> Image.Image:
        """Returns the mask of what an edit changed, within the limit; for the arguments see :func:`~imagic_lora.photos.mask.changed`."""
        return ImageChops.darker(changed(edit, reference), self.limit)

    def pasted(self, edit: Image.Image, mask: Image.Image) -> Image.Image:
        """Returns the photo with an edit. Where the mask is black, it equals the photo byte for byte.

        Args:
            edit: RGB, of the region's size.
            mask: mode L, of the region's size.
        """
        image = self.photo.copy()
        image.paste(edit, self.region.box, mask)
        return image

    def whole(self, mask: Image.Image) -> Image.Image:
        """Returns a mask of the region in the size of the photo."""
        image = Image.new("L", self.photo.size)
        image.paste(mask, self.region.box)
        return image
