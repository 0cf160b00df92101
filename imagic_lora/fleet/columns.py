"""The columns of a list: what is particular to a photo, and every setting of a fit by its dotted key or by the name of its flag."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..core.config import RunConfig
from ..core.errors import ImagicError

OWN = ("photo", "prompt", "name", "region")
"""Columns that are no settings."""
Key = tuple[str, ...]


@cache
def settings() -> dict[str, Key]:
    """Returns the key path of every setting by the names that a column may have: ``tune.rank`` and ``rank``."""
    found: dict[str, Key] = {}
    for key, field in _fields(RunConfig, ()):
        found[".".join(key)] = key
        found |= dict.fromkeys(_flags(field), key)
    return found


def _fields(model: type[BaseModel], group: Key) -> Iterator[tuple[Key, FieldInfo]]:
    """Yields the settings of a config model and of the groups in it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, (*group, name))
        else:
            yield (*group, name), field


def _flags(field: FieldInfo) -> list[str]:
    """The names of the flags that a setting declares, as columns."""
    parameters = [entry for entry in field.metadata if isinstance(entry, Parameter)]
    return [_column(flag) for parameter in parameters for flag in parameter.name or ()]


def _column(name: str) -> str:
    """The name of a column as it is compared: ``--guidance-scale`` and ``guidance_scale`` are one."""
    return name.removeprefix("--").replace("-", "_")


def sorted_columns(columns: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates the columns of a line.

    Args:
        columns: the values by the names of their columns.

    Returns:
        The values of :data:`OWN`, and the settings as nested mappings.

    Raises:
        ImagicError: a column is unknown, or two columns are the same setting.
    """
    own, given, names = dict[str, Any](), dict[str, Any](), dict[Key, str]()
    for name, value in columns.items():
        key = (name,) if name in OWN else settings().get(_column(name))
        if key is None:
            close = difflib.get_close_matches(_column(name), [*OWN, *settings()], 3, 0.5)
            meant = f" such as {', '.join(close)}" if close else ""
            raise ImagicError(f"unknown column {name!r}", f"{', '.join(OWN)} or a setting of fit{meant}", "see docs/reference/settings.md")
        if key in names:
            raise ImagicError(f"columns {names[key]!r} and {name!r} are the same setting", "each setting once", "remove one of them")
        names[key] = name
        if name in OWN:
            own[name] = value
            continue
        group = given
        for part in key[:-1]:
            group = group.setdefault(part, {})
        group[key[-1]] = value
    return own, given
