"""A list of pictures that anybody made, ``pictures.csv`` or ``pictures.jsonl``: one line a picture.

Columns: ``source`` (the photo), ``edited`` (the picture) and ``prompt`` (the target prompt); and where there is one ``source_prompt``,
``mask`` (an image: white is the region of the edit), ``method`` (the row of the table) and ``class``. Paths are relative to the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from ...fleet.lists import Problems, read_list
from .cases import Case, Picture, entry_text

LISTS = ("pictures.csv", "pictures.jsonl")
NEEDED, OPTIONAL = ("source", "edited", "prompt"), ("source_prompt", "mask", "method", "class")


def read_pictures(folder: Path) -> list[Picture]:
    """Reads a list; a line whose values are wrong becomes a picture with a problem.

    Args:
        folder: the folder of the list, or the list.

    Raises:
        ImagicError: there is no list, or more than one; a column is missing or unknown; it is no CSV or JSONL.
    """
    path = _list_in(folder)
    problems = Problems()
    rows = read_list(path, None, problems, needed="source")
    problems.raise_any(path)
    columns = {name for row in rows for name in row.values}
    missing, unknown = [name for name in NEEDED if name not in columns], sorted(columns - {*NEEDED, *OPTIONAL})
    if missing or unknown:
        got = f"{path} has no column {missing[0]}" if missing else f"{path} has an unknown column {unknown[0]!r}"
        raise ImagicError(got, f"the columns {', '.join(NEEDED)}, and of {', '.join(OPTIONAL)} what there is", "correct the list")
    cases: dict[tuple[Any, ...], Case] = {}
    found: dict[tuple[int, str], Picture] = {}
    for row in rows:
        picture = _picture(row.values, row.place, path, cases)
        other = found.setdefault((picture.case.index, picture.row), picture)
        if other is not picture:
            got = f"{path}, {row.place}: method {picture.row!r} has the edit of {other.case.name} already"
            raise ImagicError(got, "each edit once a method", "name the methods in the column method, or remove the line")
    return list(found.values())


def _list_in(folder: Path) -> Path:
    if not folder.is_dir():
        if folder.is_file() and folder.suffix.lower() in (".csv", ".jsonl"):
            return folder
        raise ImagicError(f"{folder} is no folder and no list", "a folder, or a .csv or .jsonl file", "check the path")
    found = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(found) != 1:
        got = f"{folder} has {'both ' + ' and '.join(LISTS) if found else 'no list of pictures'}"
        remedy = "name the list; for outputs of TEdBench or PIE-Bench use --tedbench or --pie; docs/guide/benchmarks.md shows a list"
        raise ImagicError(got, f"one of {' and '.join(LISTS)}", remedy)
    return found[0]


def _picture(values: Mapping[str, Any], place: str, path: Path, cases: dict[tuple[Any, ...], Case]) -> Picture:
    """The picture of a line. Lines of several methods that ask for the same edit share a case."""
    entry, texts = dict(values), dict[str, str]()
    try:
        for name in (*NEEDED, *(name for name in OPTIONAL if name in entry)):
            texts[name] = entry_text(entry, name)
        paths = {name: path.parent / texts[name] for name in ("source", "edited", "mask") if name in texts}
    except ImagicError as error:
        case = Case(len(cases), place, path, "", problem=error.got)
        cases[place,] = case
        return Picture(case, str(entry.get("method", "pictures")), None)
    key = tuple(texts.get(name) for name in ("source", "prompt", "source_prompt", "mask", "class"))
    if key not in cases:
        kept = {"source_prompt": texts.get("source_prompt"), "mask": paths.get("mask"), "group": texts.get("class")}
        cases[key] = Case(len(cases), place, paths["source"], texts["prompt"], **kept)
    return Picture(cases[key], texts.get("method", "pictures"), paths["edited"])
