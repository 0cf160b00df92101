"""The photos that are fitted together: what differs between them, and what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.store import folded
from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..photos.canvas import canvas_size
from ..photos.reading import Photo, read_photo
from ..photos.region import Region
from ..sampling.checks import check_sampling


@dataclass(frozen=True)
class Item:
    """A photo of a group, and what differs from those of the others.

    Args:
        photo: path of the photo.
        prompt: the target prompt.
        name: name of the adapter.
        seed: None for the seed of the settings.
        region: the part of the photo to fit; all of it by default.
        store_photo: whether the adapter keeps the photo's file.
        overwrite: replaces an adapter and an unfinished fit of the same name.
        resume: continues from the newest intact checkpoint of that name.
    """

    photo: Path
    prompt: str
    name: str
    seed: int | None = None
    region: Region | None = None
    store_photo: bool = True
    overwrite: bool = False
    resume: bool = False


def groups(items: Iterable[Item], config: RunConfig, architecture: Architecture, most: int) -> Iterator[list[Item]]:
    """Sorts photos into groups of one canvas size, reading them one after the other; a group is yielded as soon as it is full.

    Args:
        items: the photos. One that cannot be read is a group of its own, whose fit gives the reason.
        config: the settings of their fits.
        architecture: that of the base.
        most: largest number of photos in a group.
    """
    open_groups: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        try:
            size = canvas_of(item, read_photo(item.photo), config, architecture)
        except (ImagicError, OSError):
            yield [item]
            continue
        open_groups.setdefault(size, []).append(item)
        if len(open_groups[size]) >= most:
            yield open_groups.pop(size)
    yield from open_groups.values()


def canvas_of(item: Item, photo: Photo, config: RunConfig, architecture: Architecture) -> tuple[int, int]:
    """Returns width and height of the canvas of a photo, or of its region, in pixels.

    Raises:
        ImagicError: the region is not inside the photo.
    """
    if item.region:
        item.region.check_inside(photo.image.size)
    size = item.region.size if item.region else photo.image.size
    return canvas_size(*size, config.resolution or architecture.resolution, architecture.size_multiple)


def check_group(items: Sequence[Item], config: RunConfig) -> None:
    """Raises ImagicError if these photos cannot be fitted together, whatever the base is."""
    count = Counter(folded(item.name) for item in items)
    if twins := [item.name for item in items if count[folded(item.name)] > 1]:
        raise ImagicError(f"several photos of the name {', '.join(twins)}", "a name for each photo", "choose other names")
    if not items:
        raise ImagicError("no photos to fit", "at least one", "give some")
    if config.method != "imagic":
        got = f"--method {config.method} for photos that are fitted together"
        raise ImagicError(got, "--method imagic", "fit one photo at a time: --together 1")
    if config.tune.mode == "full":
        expected = "--mode lora or --mode embedding: in mode full every photo changes the whole denoiser"
        raise ImagicError("--mode full for photos that are fitted together", expected, "change --mode, or fit one photo at a time")
    check_sampling(config.edit)
