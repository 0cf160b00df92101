"""The fields of a form, read from the settings models: label, help, limits, choices and default are written in ``core/config.py`` alone."""

from __future__ import annotations

import re
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from cyclopts import Parameter
from pydantic import BaseModel


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        path: its place in the model, such as ``tune.rank``.
        flag: its flag on the command line.
        help: its help text.
        kind: ``int``, ``float``, ``text``, ``bool`` or ``choice``.
        choices: the values of a choice.
        low, high: limits of a number; None where there is none.
        default: the built-in default; a base, a preset or an adapter may have another.
    """

    path: str
    flag: str
    help: str
    kind: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    default: Any

    @property
    def label(self) -> str:
        """The name for people: ``learning rate``."""
        return self.path.rpartition(".")[2].replace("_", " ")


def settings_of(model: type[BaseModel], group: str = "") -> list[Setting]:
    """Returns the settings of a model, those of its groups included, in their order.

    Args:
        model: the model.
        group: its place in a larger one.
    """
    found: list[Setting] = []
    for name, field in model.model_fields.items():
        path, annotation = f"{group}.{name}" if group else name, field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += settings_of(annotation, path)
            continue
        flags = [next(iter(one.name)) for one in field.metadata if isinstance(one, Parameter) and one.name]
        kind, choices = _kind(annotation)
        limits = {type(one): one for one in field.metadata if isinstance(one, Ge | Gt | Le | Lt)}
        low = next((float(getattr(limits[t], n)) for t, n in ((Ge, "ge"), (Gt, "gt")) if t in limits), None)
        high = next((float(getattr(limits[t], n)) for t, n in ((Le, "le"), (Lt, "lt")) if t in limits), None)
        flag = flags[0] if flags else f"--{path.replace('_', '-')}"
        found.append(Setting(path, flag, field.description or "", kind, choices, low, high, field.default))
    return found


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values by path, such as ``tune.rank``, as nested mappings."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return found


def value_at(model: Any, path: str) -> Any:
    """Returns the value of a setting in a model."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def field_of(message: str, fields: dict[str, str]) -> str | None:
    """Returns the field that the message of an error names, by its path or its flag; None if it names none.

    Args:
        message: what was got.
        fields: the flag of every field, by its path.
    """
    for path, flag in sorted(fields.items(), key=lambda item: -len(item[0])):
        names = (re.escape(path), re.escape(flag))
        if any(re.search(rf"(?<![\w.-]){name}(?![\w.-])", message) for name in names):
            return path
    return None


def _kind(annotation: Any) -> tuple[str, tuple[str, ...]]:
    """The kind of an annotation and, if it is a Literal, its values."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return "choice", tuple(get_args(annotation))
    return {int: "int", float: "float", bool: "bool"}.get(annotation, "text"), ()
