"""A case of a benchmark (photo, prompts, mask), a picture (the edit of a case), and how both are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...core.errors import ImagicError, unreadable
from ...core.text import check_utf8
from ...photos.reading import read_mask, read_photo
from ..evaluator.evaluator import Subject

MAX_BYTES = 2**28
"""Size of a JSON file of a benchmark."""
MASK_SIDE = 512
"""Side of the masks of PIE-Bench, in pixels."""


@dataclass(frozen=True)
class Case:
    """One edit of one photo, as a benchmark asks for it.

    Args:
        index: number of the case, from 0.
        name: what the benchmark calls it.
        photo: path of the photo.
        prompt: the target prompt.
        source_prompt: a caption of the photo, or None.
        mask: path of the mask; or runs of pixels, start and length in turns; None without one.
        group: its class.
        problem: what is wrong with its entry; None if nothing is.
    """

    index: int
    name: str
    photo: Path
    prompt: str
    source_prompt: str | None = None
    mask: Path | tuple[int, ...] | None = None
    group: str | None = None
    problem: str | None = None

    def check(self) -> None:
        """Raises ImagicError if something is wrong with its entry."""
        if self.problem is not None:
            raise ImagicError(f"case {self.name}: {self.problem}", "an entry as it was published", "correct it, or leave it out")

    def read_photo(self) -> Image.Image:
        """Returns the photo, RGB.

        Raises:
            ImagicError: something is wrong with the entry, or the photo cannot be read.
        """
        self.check()
        return read_photo(self.photo).image

    def read_mask(self, size: tuple[int, int]) -> Image.Image | None:
        """Returns the mask, mode L, of the size of the photo; None without one.

        Raises:
            ImagicError: it cannot be read, or has another size.
        """
        if isinstance(self.mask, Path):
            return read_mask(self.mask, size, empty=True).image
        return None if self.mask is None else decoded_mask(self.mask, size)


@dataclass(frozen=True)
class Picture:
    """The edit of a case, as a file.

    Args:
        case: the case.
        row: what made it: a method.
        path: the file; None if there is none.
        strip: whether the file may be a strip of panels, whose last one is the edit.
        problem: why there is none.
    """

    case: Case
    row: str
    path: Path | None
    strip: bool = False
    problem: str | None = None

    def read(self, photo: Image.Image) -> Subject:
        """Reads the picture and its mask.

        Args:
            photo: the photo of the case, RGB.

        Raises:
            ImagicError: there is no picture, or one of the files cannot be read.
        """
        if self.path is None:
            raise ImagicError(self.problem or "no picture", "a picture of every case", "make it")
        edited = read_photo(self.path)
        picture = last_panel(edited.image, photo.size, self.path) if self.strip else edited.image
        case = self.case
        return Subject(photo, picture, case.prompt, case.source_prompt, case.read_mask(photo.size), edited.suffix == ".jpg")


def decoded_mask(runs: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Returns the mask of run lengths over the rows of 512 x 512 pixels, mode L. A run that is too long ends at the last pixel.

    Args:
        runs: start and length of each run, in turns.
        size: width and height of the photo.

    Raises:
        ImagicError: the photo has another size.
    """
    if size != (MASK_SIDE, MASK_SIDE):
        got = f"a photo of {size[0]} x {size[1]} pixels with a mask in run lengths"
        raise ImagicError(got, f"{MASK_SIDE} x {MASK_SIDE} pixels, the size of the masks", "use the photo as it was published")
    flat = np.zeros(MASK_SIDE * MASK_SIDE, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = 255
    return Image.fromarray(flat.reshape(MASK_SIDE, MASK_SIDE))


def last_panel(image: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    """Returns the last panel of a strip of panels of the size of the photo; a picture of that size is one panel.

    Raises:
        ImagicError: the picture consists of no such panels.
    """
    width, height = size
    if image.height != height or image.width % width:
        got = f"{path} has {image.width} x {image.height} pixels"
        raise ImagicError(got, f"{width} x {height} pixels, or panels of that size side by side", "use the output as it was written")
    return image.crop((image.width - width, 0, image.width, height))


def entry_text(entry: dict[str, Any], name: str) -> str:
    """Returns the text of an entry.

    Raises:
        ImagicError: it is missing, no text, empty, or not UTF-8.
    """
    text = entry.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ImagicError(f"{name} is {text!r:.80}" if name in entry else f"no {name}", "text", "")
    check_utf8(text, name)
    return text


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file that an entry names, which must lie in a folder.

    Raises:
        ImagicError: the name leads out of the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ImagicError(f"the path {name!r:.200} leads out of {folder}", "a path in that folder", "")
    return path


def read_json(path: Path, kind: type) -> Any:
    """Reads a JSON file of a benchmark.

    Args:
        path: the file.
        kind: ``list`` or ``dict``, what it must hold.

    Raises:
        ImagicError: it cannot be read, or holds something else.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ImagicError(f"{path} is no file, or larger than {MAX_BYTES:,} bytes", "a JSON file", "use the benchmark as published")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ImagicError(f"{path} is no JSON ({error})", "the JSON file of the benchmark", "download it again") from error
    if not isinstance(content, kind) or not content:
        got = f"{path} holds {'an empty ' if isinstance(content, kind) else 'a '}{type(content).__name__}"
        raise ImagicError(got, f"a JSON {'array' if kind is list else 'object'} of cases", "use the benchmark as published")
    return content


def pixel_hash(image: Image.Image) -> str:
    """Returns a hash of the pixels of a photo: equal for one photo in two files."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
