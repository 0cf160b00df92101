"""PIE-Bench (arXiv 2310.01506): 700 edits in ten classes, and the layout of the outputs of its own code.

    mapping_file.json     {id: {"image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask", ...}}
    annotation_images/    the photos, 512 x 512; image_path is relative to it

Changed words are in brackets, which belong to no prompt. A mask is runs of pixels, ``[start, length, start, length, ...]``. An output of
its own code has the path of the photo, and is a strip of four panels: the instruction, the photo, its reconstruction and the edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from .cases import MASK_SIDE, Case, Picture, entry_text, inside, read_json

MAPPING, IMAGES = "mapping_file.json", "annotation_images"
CLASSES = {
    "0": "random",
    "1": "change object",
    "2": "add object",
    "3": "delete object",
    "4": "change content",
    "5": "change pose",
    "6": "change colour",
    "7": "change material",
    "8": "change background",
    "9": "change style",
}


def read_pie(folder: Path) -> list[Case]:
    """Reads the cases of PIE-Bench; a wrong entry becomes a case with a problem.

    Args:
        folder: the folder that was published.

    Raises:
        ImagicError: the folder has another layout.
    """
    if not (folder / IMAGES).is_dir():
        expected = f"{MAPPING} and {IMAGES}/, as in the folder that its authors send"
        raise ImagicError(f"{folder} has no folder {IMAGES}", expected, "name that folder")
    return [_case(index, name, entry, folder) for index, (name, entry) in enumerate(read_json(folder / MAPPING, dict).items())]


def _case(index: int, name: str, entry: Any, folder: Path) -> Case:
    try:
        if not isinstance(entry, dict):
            raise ImagicError(f"a {type(entry).__name__}", "", "")
        photo = inside(folder / IMAGES, entry_text(entry, "image_path"))
        source, target = (unbracketed(entry_text(entry, field)) for field in ("original_prompt", "editing_prompt"))
        kind = str(entry.get("editing_type_id"))
        if kind not in CLASSES:
            raise ImagicError(f"editing_type_id is {kind!r:.40}", "", "")
        return Case(index, name, photo, target, source, _runs(entry.get("mask")), CLASSES[kind])
    except ImagicError as error:
        return Case(index, name, folder, "", problem=error.got)


def unbracketed(prompt: str) -> str:
    """Returns a prompt without the brackets around changed words.

    Raises:
        ImagicError: nothing else is in it.
    """
    text = prompt.replace("[", "").replace("]", "")
    if not text.strip():
        raise ImagicError(f"the prompt {prompt!r:.80} is empty", "", "")
    return text


def _runs(mask: Any) -> tuple[int, ...]:
    """The runs of a mask, checked."""
    whole = isinstance(mask, list) and all(isinstance(value, int) and not isinstance(value, bool) for value in mask)
    if not whole or len(mask) % 2:
        raise ImagicError("mask is no list of pairs of whole numbers", "", "")
    for start, length in zip(mask[::2], mask[1::2], strict=True):
        if not (0 <= start < MASK_SIDE**2 and length >= 0):
            raise ImagicError(f"mask has a run of {length} pixels at {start}", "", "")
    return tuple(mask)


def pie_outputs(cases: list[Case], folder: Path) -> list[Picture]:
    """Finds the output of every case: at the path of its photo, in the folder or in ``annotation_images`` inside it.

    Args:
        cases: the cases.
        folder: the outputs of one method.

    Raises:
        ImagicError: there is no such folder.
    """
    if not folder.is_dir():
        raise ImagicError(f"{folder} is no folder", "the outputs of one method", "check the path")
    root = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    named = root.resolve()
    row = named.parent.name if named.name == IMAGES else named.name
    return [_output(case, root, row) for case in cases]


def _output(case: Case, root: Path, row: str) -> Picture:
    if case.problem is not None:
        return Picture(case, row, None)
    photos = next(parent for parent in case.photo.parents if parent.name == IMAGES)
    relative = case.photo.relative_to(photos)
    found = [path for ending in (relative.suffix, ".png", ".jpg") if (path := (root / relative).with_suffix(ending)).is_file()]
    if found:
        return Picture(case, row, found[0], strip=True)
    return Picture(case, row, None, problem=f"no output at {root / relative}")
