"""Masks of what an edit may change, and edits pasted into the photo."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from common import each
from photos.building import bytes_of, noise
from PIL import Image

from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.composite import Composite
from imagic_lora.photos.mask import _otsu, _without_islands, changed, feathered, reduced, softened
from imagic_lora.photos.reading import read_mask
from imagic_lora.photos.region import Region


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photo of soft colours."""
    small = Image.fromarray(noise(4, 5, 3, seed=seed) // 2 + 60)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """A mask ``[H, W]`` that is True in a box."""
    mask = np.zeros(size[::-1], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def by_flooding(mask: np.ndarray, smallest: float) -> np.ndarray:
    """The islands of at least this size, or a quarter of the largest, found pixel by pixel."""
    kept, seen, islands = np.zeros_like(mask), np.zeros_like(mask), []
    for start in zip(*np.nonzero(mask), strict=True):
        island, waiting = [], [] if seen[start] else [start]
        while waiting:
            y, x = waiting.pop()
            if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]) or not mask[y, x] or seen[y, x]:
                continue
            seen[y, x] = True
            island.append((y, x))
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        islands.append(island)
    largest = max(map(len, islands), default=0)
    for island in islands:
        if len(island) >= min(smallest, largest / 4) and island:
            kept[tuple(np.transpose(island))] = True
    return kept


@each("share, smallest", [(0.3, 3), (0.6, 20), (0.5, 1), (0.0, 5), (1.0, 5), (0.4, 10_000)])
def test_small_islands_are_dropped_as_by_flooding(share: float, smallest: int) -> None:
    """On random pixels, where islands have every shape, and on an empty and a full mask."""
    mask = np.random.default_rng(smallest).random((40, 53)) < share
    assert np.array_equal(_without_islands(mask, smallest), by_flooding(mask, smallest))


def test_the_threshold_is_otsus() -> None:
    """No other one of 256 has a greater variance between its two sides."""
    values = np.concatenate([np.random.default_rng(0).normal(5, 2, 3000), np.random.default_rng(1).normal(60, 9, 700)]).astype(np.float32)

    def between(threshold: float) -> float:
        low, high = values[values < threshold], values[values >= threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(between(threshold) for threshold in np.linspace(0, 255, 257))
    assert between(_otsu(values)) == pytest.approx(best)


def test_a_mask_fades_inwards_and_only_there() -> None:
    """By even steps over 1/64 of the side from the edge of the mask; the edge of the image is none."""
    inside = rectangle((256, 256), (100, 0, 256, 256))
    weights = np.asarray(feathered(inside))
    assert not weights[~inside].any()
    assert weights[128, 100:106].tolist() == [51, 102, 153, 204, 255, 255]
    assert (weights[:, 104:] == 255).all()
    corner = np.asarray(feathered(rectangle((256, 256), (100, 100, 200, 200))))
    assert np.array_equal(corner[100:200, 100:200], corner[100:200, 100:200].T)


def test_the_gray_of_a_mask_stays_and_its_black_stays_black() -> None:
    """The feather multiplies it."""
    gray = np.zeros((128, 128), np.uint8)
    gray[20:100, 20:100] = 90
    weights = np.asarray(softened(Image.fromarray(gray)))
    assert not weights[gray == 0].any()
    assert (weights[22:98, 22:98] == 90).all()
    assert 0 < weights[20, 60] < 90


def edited(photo: np.ndarray, box: tuple[int, int, int, int], by: int = 70) -> np.ndarray:
    """The photo with a box that is brighter."""
    image = photo.astype(int)
    image[box[1] : box[3], box[0] : box[2]] += by
    return image.clip(0, 255).astype(np.uint8)


@each("size", [(64, 64), (300, 200), (1500, 1000)])
def test_what_an_edit_changed_is_found(size: tuple[int, int]) -> None:
    """All of a changed rectangle, and little around it; neither faint noise nor a speck."""
    width, height = size
    photo = smooth(height, width)
    box = (width // 4, height // 4, width // 2, height * 3 // 4)
    image = edited(photo, box)
    image[-height // 50 :, -width // 50 :] //= 2
    image = (image + np.random.default_rng(0).integers(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
    mask = np.asarray(changed(Image.fromarray(image), reduced(Image.fromarray(photo))))
    inside, margin = rectangle(size, box), round(np.sqrt(width * height) / 16)
    around = rectangle(size, (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin))
    assert mask.shape == (height, width)
    assert (mask[inside] > 200).mean() > 0.99
    assert not mask[~around].any()


def test_the_same_image_has_not_changed_and_another_one_has_everywhere() -> None:
    """Black and white."""
    photo = Image.fromarray(smooth(60, 90))
    assert changed(photo, reduced(photo)).getextrema() == (0, 0)
    assert changed(Image.fromarray(edited(smooth(60, 90), (0, 0, 90, 60), 50)), reduced(photo)).getextrema() == (255, 255)


def test_a_hole_of_a_few_pixels_is_filled() -> None:
    """An edit is pasted without pinholes."""
    photo = smooth(256, 256)
    image = edited(photo, (50, 50, 200, 200))
    image[120:126, 120:126] = photo[120:126, 120:126]
    mask = np.asarray(changed(Image.fromarray(image), reduced(Image.fromarray(photo))))
    assert (mask[60:190, 60:190] == 255).all()


LARGE = (4000, 3000)
PHOTO = noise(*LARGE[::-1], 3)


@each("region", [(1000, 700, 1024, 1024), (0, 1000, 4000, 256), (2976, 1976, 1024, 1024)])
def test_outside_of_a_region_of_12_megapixels_every_byte_is_that_of_the_photo(region: tuple[int, int, int, int]) -> None:
    """Inside, the middle is that of the edit; the seam fades over a few pixels, but not at an edge of the photo."""
    photo, part = PHOTO, Region(*region)
    inside = np.s_[part.y : part.y + part.height, part.x : part.x + part.width]
    edit = Image.fromarray(255 - photo[inside])
    composite = Composite.of(Image.fromarray(photo), part)
    image = np.asarray(composite.pasted(edit, composite.limit))
    expected = photo.copy()
    expected[inside] = image[inside]
    assert np.array_equal(image, expected)
    weights = np.asarray(composite.limit)
    whole = np.zeros(LARGE[::-1], np.uint8)
    whole[inside] = weights
    assert np.array_equal(np.asarray(composite.whole(composite.limit)), whole)
    assert weights[part.height // 2, part.width // 2] == 255
    at_border = {"left": part.x == 0, "top": part.y == 0, "right": part.box[2] == LARGE[0], "bottom": part.box[3] == LARGE[1]}
    middles = {"left": weights[part.height // 2, 0], "top": weights[0, part.width // 2]}
    middles |= {"right": weights[part.height // 2, -1], "bottom": weights[-1, part.width // 2]}
    assert {side: value == 255 for side, value in middles.items()} == at_border


def test_where_a_mask_of_the_user_is_black_every_byte_is_that_of_the_photo() -> None:
    """On 12 megapixels, alone and within a region."""
    photo = PHOTO
    mask = Image.new("L", LARGE)
    mask.paste(255, (900, 900, 1900, 1500))
    mask.paste(128, (1400, 300, 1500, 2500))
    black = np.asarray(mask) == 0
    for region in (None, Region(500, 400, 1024, 1024)):
        composite = Composite.of(Image.fromarray(photo), region, mask)
        edit = Image.fromarray(255 - np.asarray(composite.photo.crop(composite.region.box)))
        image = np.asarray(composite.pasted(edit, composite.limit))
        same = black if region is None else black | ~rectangle(LARGE, region.box)
        assert np.array_equal((image != photo).any(axis=2) & same, np.zeros_like(same))
        assert np.array_equal(image[1200, 1200], 255 - photo[1200, 1200])
    with pytest.raises(ImagicError, match="black in the whole region 0,0,64,64"):
        Composite.of(Image.fromarray(photo), Region(0, 0, 64, 64), mask)


def test_pasting_blends_by_the_mask() -> None:
    """For every pair of a mask's value and a photo's value, to the nearest level; 0 and 255 are exact."""
    weights, values = np.mgrid[0:256, 0:256].astype(np.uint8)
    photo, edit = np.repeat(values[..., None], 3, 2), np.repeat(values.T[..., None], 3, 2)
    image = np.asarray(Composite.of(Image.fromarray(photo)).pasted(Image.fromarray(edit), Image.fromarray(weights)))
    share = weights[..., None] / 255
    assert np.abs(image - (share * edit + (1 - share) * photo)).max() <= 0.51
    assert np.array_equal(image[0], photo[0])
    assert np.array_equal(image[255], edit[255])


def test_masks_of_large_photos_are_found_fast() -> None:
    """In seconds on a busy machine: those of 12 megapixels are found on a smaller image."""
    photo = Image.fromarray(smooth(3000, 4000))
    start = time.process_time()
    assert changed(Image.fromarray(edited(np.asarray(photo), (1000, 1000, 2000, 2000))), reduced(photo)).size == LARGE
    assert time.process_time() - start < 4


def drawn(mode: str) -> Image.Image:
    """A mask that is white in its left half, in a mode."""
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 20, 30))
    if mode == "transparent":
        return Image.merge("LA", (Image.new("L", mask.size, 255), mask))
    if mode == "RGBA":
        return Image.merge("RGBA", (*[Image.new("L", mask.size, 255)] * 3, mask))
    return mask.convert(mode)


@each("mode", ["1", "L", "P", "RGB", "RGBA", "transparent"])
def test_a_mask_is_read_in_every_mode(mode: str, tmp_path: Path) -> None:
    """What is transparent is black."""
    path = tmp_path / "mask.png"
    path.write_bytes(bytes_of(drawn(mode), "PNG"))
    mask = read_mask(path, (40, 30))
    assert mask.image.mode == "L"
    assert np.array_equal(np.asarray(mask.image), np.asarray(drawn("L")))


def test_a_mask_is_turned_upright_like_the_photo(tmp_path: Path) -> None:
    """Its size is compared after that."""
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "mask.jpg"
    path.write_bytes(bytes_of(drawn("L"), "JPEG", exif=exif, quality=100))
    mask = np.asarray(read_mask(path, (30, 40)).image)
    assert (mask[:16] > 250).all()
    assert (mask[24:] < 5).all()


REFUSED = {
    "another size": (bytes_of(Image.new("L", (41, 30), 255), "PNG"), "has 41x30 pixels.*the size of the photo, 40x30"),
    "black": (bytes_of(Image.new("L", (40, 30)), "PNG"), "is black everywhere"),
    "transparent": (bytes_of(Image.new("RGBA", (40, 30), (255, 255, 255, 0)), "PNG"), "is black everywhere"),
    "coloured": (bytes_of(Image.new("RGB", (40, 30), (255, 0, 0)), "PNG"), "has colours"),
    "16 bits": (bytes_of(Image.new("I;16", (40, 30), 65535), "PNG"), "is of mode I;16"),
    "text": (b"text", "not an image"),
    "empty": (b"", "is empty"),
}


@each("case", list(REFUSED))
def test_what_is_no_mask_of_the_photo_is_refused(case: str, tmp_path: Path) -> None:
    """By the name of its file."""
    data, message = REFUSED[case]
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(ImagicError, match=f"mask.png.*{message}"):
        read_mask(path, (40, 30))


@each("region", [(-1, 0, 10, 10), (0, 0, 51, 10), (0, 0, 0, 10), (45, 30, 10, 10), (0, 0, 10, -5)])
def test_a_region_outside_of_the_photo_is_refused(region: tuple[int, int, int, int]) -> None:
    """The message names the size of the photo."""
    with pytest.raises(ImagicError, match="of a photo of 50x37 pixels"):
        Region(*region).check_inside((50, 37))
