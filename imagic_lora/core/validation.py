"""The errors of pydantic in plain words."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

from pydantic import ValidationError

_EXPECTED = {  # by the type of the error, where pydantic speaks of Python instead of the file
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "invalid_key": "a name, in quotes if it consists of digits",
    "missing": "a value for it",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "string_type": "text, in quotes if it consists of digits",
    "string_unicode": "text of whole UTF-8 characters",
}


class Problem(NamedTuple):
    """The first error of a validation.

    Args:
        kind: pydantic's type of the error, such as ``missing``.
        place: the names from the outermost field to the wrong one; empty if fields contradict each other.
        got: ``tune.steps = 0``, or ``tune.steps is missing``; for a contradiction the message.
        expected: what would be valid.
    """

    kind: str
    place: tuple[int | str, ...]
    got: str
    expected: str


def first_problem(error: ValidationError) -> Problem:
    """Describes the first error of a validation."""
    first = error.errors()[0]
    kind, place = first["type"], tuple(part for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = f"{'.'.join(map(str, place))} {_found(kind, first['input'])}" if place else message
    return Problem(kind, place, got, _EXPECTED.get(kind, message))


def _found(kind: str, value: Any) -> str:
    return "is missing" if kind == "missing" else f"= {reprlib.repr(value)}"
