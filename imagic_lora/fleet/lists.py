"""Reading a list of photos: CSV, JSONL, YAML, or a folder with one prompt."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..bases.loading.vetting import parsed_json
from ..core.errors import ImagicError, unreadable
from ..core.yaml_files import read_yaml

MAX_PHOTOS = 50_000
"""Number of photos of a list. The contact sheet and the results of more are better split."""
MAX_BYTES = 2**26
"""Size of a CSV or JSONL file; a YAML file has at most 1 MiB."""
_PHOTOS = frozenset((".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".pgm", ".png", ".pbm", ".tif", ".tiff", ".webp"))
_SHOWN = 20  # problems that the message of an error lists


class Row(NamedTuple):
    """A line of a list.

    Args:
        place: where it is in the list, for messages: ``line 3``.
        values: the values by column; empty cells are left out.
    """

    place: str
    values: Mapping[str, Any]


class Problem(NamedTuple):
    """What is wrong with lines of a list: the lines, what was got, and what was expected."""

    places: list[str]
    got: str
    expected: str

    def __str__(self) -> str:
        shown = ", ".join(self.places[:5]) + (f" and {len(self.places) - 5:,} more" if len(self.places) > 5 else "")
        return f"{shown}: {self.got} (expected: {self.expected})"


class ListError(ImagicError):
    """Lines of a list are wrong. ``problems`` holds all of them."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len({place for problem in problems for place in problem.places})
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        got = f"{count:,} wrong line{'' if count == 1 else 's'} in {path}"
        rest = "a list without errors; nothing was started", "correct the list and run the command again"
        self.short = ImagicError(got, *rest)
        """The error without the problems."""
        super().__init__(f"{got}: {'; '.join(map(str, problems[:_SHOWN]))}{more}", *rest)


class Problems:
    """Collects what is wrong with a list; equal problems of several lines become one."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, place: str, got: str, expected: str) -> None:
        """Adds what is wrong with a line."""
        self._places.setdefault((got, expected), []).append(place)

    def raise_any(self, path: Path) -> None:
        """Raises ListError if anything was added."""
        if self._places:
            raise ListError(path, [Problem(places, *what) for what, places in self._places.items()])


def read_list(path: Path, prompt: str | None, problems: Problems, needed: str = "photo") -> list[Row]:
    """Reads the lines of a list, unchecked.

    Args:
        path: a ``.csv``, ``.jsonl``, ``.yaml`` or ``.yml`` file, or a folder of photos.
        prompt: target prompt of the lines without one; a folder needs it.
        problems: receives the lines that cannot be read.
        needed: the column that the header of a CSV file must have.

    Raises:
        ImagicError: there is no such file or folder, its format is another, it is not UTF-8, too large, holds no photo or too many.
    """
    if path.is_dir():
        rows = _folder(path, prompt)
    else:
        readers = {".csv": partial(_csv, needed=needed), ".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml}
        if (reader := readers.get(path.suffix.lower())) is None:
            raise ImagicError(
                f"{path} is no list of photos", f"a folder, or a file that ends in {', '.join(readers)}", "rename or convert it"
            )
        rows = reader(path, problems)
    found: list[Row] = []
    for row in rows:
        if len(found) == MAX_PHOTOS:
            got = f"{path} has more than {MAX_PHOTOS:,} photos"
            raise ImagicError(got, f"at most {MAX_PHOTOS:,} photos in a list", "split the list, and run one after another")
        found.append(row)
    if prompt is not None:
        found = [Row(row.place, {"prompt": prompt, **row.values}) for row in found]
    if not found and not problems:
        raise ImagicError(f"{path} holds no photos", "at least one photo", "check LIST")
    return found


def _folder(path: Path, prompt: str | None) -> Iterator[Row]:
    """The photos in a folder, by their endings, in the order of their names; other files are left out."""
    if prompt is None:
        raise ImagicError(
            f"a folder of photos, {path}, without a prompt", "one target prompt for all of them", 'add --prompt "a dog jumping"'
        )
    try:
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in _PHOTOS and not one.name.startswith(".") and one.is_file())
    except OSError as error:
        raise unreadable(path, error) from error
    for file in files:
        yield Row(file.name, {"photo": file.name})


def _text(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        if path.exists() and not path.is_file():
            raise ImagicError(f"{path} is not a file", "a file or a folder", "check LIST")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ImagicError(f"{path} has {size:,} bytes", f"at most {MAX_BYTES:,} bytes", "split the list")
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8"
        raise ImagicError(got, "a text file in UTF-8", "save it as UTF-8, or convert it, for example: iconv -f latin1 -t utf-8") from error


def _csv(path: Path, problems: Problems, needed: str) -> Iterator[Row]:
    """The lines below the header; cells are separated by the one of ``,``, ``;`` and tabs that the header has most of."""
    text = _text(path)
    header_line = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header_line.count), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        problems.add("line 1", f"the column {doubled[0]!r} occurs twice", "each column once")
        return
    if needed not in header:
        among = ", ".join(map(repr, header[:20])) or "none"
        problems.add("line 1", f"no column {needed} among {among}", f"the names of the columns, one of them {needed}")
        return
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"line {first}", f"it cannot be read ({error})", "CSV with balanced quotes")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            problems.add(
                f"line {first}", f"{len(cells)} cells", f"{len(header)} cells as in the header; quote cells that hold the separator"
            )
            continue
        yield Row(f"line {first}", {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()})


def _jsonl(path: Path, problems: Problems) -> Iterator[Row]:
    """One JSON object a line."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = parsed_json(line)
        except (ValueError, RecursionError) as error:
            problems.add(
                f"line {number}",
                f"it cannot be read ({next(iter(str(error).splitlines()), 'nested too deeply')})",
                "one JSON object a line",
            )
            continue
        yield from _flattened(f"line {number}", values, problems)


def _yaml(path: Path, problems: Problems) -> Iterator[Row]:
    """The mappings below the key ``photos``."""
    expected = "one key photos, with a list of mappings of photo, prompt and settings"
    content = read_yaml(path, "docs/guide/many-photos.md")
    photos = content.get("photos")
    if set(content) != {"photos"} or not isinstance(photos, list):
        got = f"{path} holds the keys {', '.join(map(repr, list(content)[:10])) or 'none'}"
        raise ImagicError(got if set(content) != {"photos"} else f"photos of {path} is a {type(photos).__name__}", expected, "correct it")
    for number, values in enumerate(photos, 1):
        if isinstance(values, dict) and all(isinstance(name, str) for name in values):
            yield from _flattened(f"photo {number}", values, problems)
        else:
            problems.add(f"photo {number}", f"it is no mapping but {type(values).__name__}", "a mapping of photo, prompt and settings")


def _flattened(place: str, values: Mapping[str, Any], problems: Problems) -> Iterator[Row]:
    """A line by dotted names; a group of settings may be nested, as in a file for ``--config``. Empty values are left out."""
    flat = dict[str, Any]()
    for name, value in values.items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        if doubled := sorted(flat.keys() & inner.keys()):
            problems.add(place, f"{doubled[0]!r} and a nested value are the same setting", "each setting once")
            return
        flat |= inner
    yield Row(place, {name: value for name, value in flat.items() if value is not None and value != ""})
