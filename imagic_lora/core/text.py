"""Text that files and libraries accept, whole UTF-8 characters; parts of file names; numbers and durations as text."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import ImagicError


def check_utf8(text: str, what: str) -> None:
    """Checks that a text can be written as UTF-8.

    Python decodes bytes of the command line and of paths that are not UTF-8 to lone surrogates, which tokenizers and safetensors reject,
    and which JSON files would hold as half a character.

    Args:
        text: a prompt, a path, or a name.
        what: what the text is, for the error message.

    Raises:
        ImagicError: the text holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"{what} {text!r}, which is not UTF-8"
        remedy = "type it again in a terminal that uses UTF-8; a file with another encoding can be converted by iconv, or renamed"
        raise ImagicError(got, "text of whole UTF-8 characters", remedy) from error


def json_text(values: Any) -> str:
    """Returns the content of a JSON file: strict, indented, with a line break at its end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def exact(number: float) -> str:
    """Returns the shortest text that reads back as the same number, for names and labels: two numbers never share one."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def slug(text: str, fallback: str) -> str:
    """Returns a text as a part of a file name: letters, digits, ``.``, ``_`` and ``-``; the fallback if nothing remains."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or fallback


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units: ``2 d 3 h``, ``4 min 10 s``."""
    rest, parts = round(seconds), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
