"""The edits of finished runs: of a benchmark, or of comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError, unreadable
from ...photos.reading import read_metadata

_PHOTO = "source.png"
_EXPECTED = "a finished run of a benchmark, or a folder that compare wrote"


@dataclass(frozen=True)
class Item:
    """A photo, the target prompt, and its edits.

    Args:
        name: the folder of the run and the name of the case.
        prompt: the target prompt.
        photo: file of the photo.
        edits: files of the edits, by method.
    """

    name: str
    prompt: str
    photo: Path
    edits: Mapping[str, Path]


def read_results(folders: Sequence[Path]) -> list[Item]:
    """Reads the edits of finished runs.

    A run of a benchmark has a folder ``cases``. Each case holds the photo ``source.png``, a JSON file for each method, and a PNG file for
    each row of the methods that did not fail, whose metadata has the target prompt as ``text`` or ``target_prompt``. A row is what a study
    calls a method. A comparison has a ``results.json``.

    Args:
        folders: output folders of ``bench`` or ``compare``, of different names.

    Raises:
        ImagicError: a folder is neither, is damaged, or holds no edit; two folders have one name.
    """
    items: list[Item] = []
    for folder in folders:
        name = folder.resolve().name
        if any(item.name.split("/")[0] == name for item in items):
            raise ImagicError(f"two folders of results have the name {name}", "a name for each", "rename one of them")
        try:
            if (folder / "cases").is_dir():
                found = list(_benchmark(folder, name))
            elif (folder / "results.json").is_file():
                found = [_comparison(folder, name)]
            elif not folder.is_dir():
                raise ImagicError(f"{folder} is not a folder", _EXPECTED, "check the path")
            else:
                raise ImagicError(f"{folder} holds no results", _EXPECTED, "run bench or compare first, or choose another folder")
        except OSError as error:
            raise unreadable(error.filename or folder, error) from error
        if not any(item.edits for item in found):
            raise ImagicError(f"{folder} holds no edits", "at least one case that did not fail", "run bench or compare again")
        items += found
    return items


def _benchmark(folder: Path, name: str) -> Iterator[Item]:
    """The cases of a run of a benchmark, in the order of their names."""
    for case in sorted(path for path in (folder / "cases").iterdir() if path.is_dir()):
        edits: dict[str, Path] = {}
        for file in sorted(case.glob("*.json")):
            rows = _object(file, "rows")
            edits |= {row: _existing(case / f"{row}.png") for row in rows}
        if edits:
            metadata = read_metadata(next(iter(edits.values())))
            prompt = _prompt(metadata, "text" if "text" in metadata else "target_prompt", case)
            yield Item(f"{name}/{case.name}", prompt, _existing(case / _PHOTO), edits)


def _comparison(folder: Path, name: str) -> Item:
    """The only item of a comparison."""
    file = folder / "results.json"
    summary = _read(file)
    try:
        edits = {one["name"]: _existing(folder / one["file"]) for one in summary["methods"] if one.get("file")}
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file) from error
    return Item(name, _prompt(summary, "target_prompt", file), _existing(folder / "photo.png"), edits)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file) from error
    if not isinstance(found, dict):
        raise _damaged(file)
    return found


def _object(file: Path, name: str) -> dict[str, Any]:
    """A JSON object within the JSON object of a file."""
    value = _read(file).get(name)
    if not isinstance(value, dict):
        raise _damaged(file)
    return value


def _prompt(values: Mapping[str, Any], name: str, place: Path) -> str:
    prompt = values.get(name)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ImagicError(f"{place} has no target prompt", _EXPECTED, "run bench or compare again")
    return prompt


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ImagicError(f"{path} is missing", "the images of a finished run", "run the same command again, which makes them")
    return path


def _damaged(file: Path) -> ImagicError:
    return ImagicError(f"{file} is no file of results", _EXPECTED, "run bench or compare again")
