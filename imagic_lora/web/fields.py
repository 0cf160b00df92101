"""The fields of a form. Label, help, limits, choices and defaults are those of the settings models and of the commands' functions."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
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
        kind: ``int``, ``float``, ``text``, ``bool``, ``choice`` or ``lines``: several texts.
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


def arguments_of(function: Callable[..., Any], names: Sequence[str]) -> list[Setting]:
    """Returns arguments of the function of a command: their help is in its docstring.

    Args:
        function: the function.
        names: the arguments, in the order in which they are returned.
    """
    hints, defaults = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    helps = {one.arg_name: " ".join((one.description or "").split()) for one in docstring_parser.parse(function.__doc__ or "").params}
    found = []
    for name in names:
        annotation, default = hints[name], defaults[name].default
        flags = [next(iter(one.name)) for one in getattr(annotation, "__metadata__", ()) if isinstance(one, Parameter) and one.name]
        kind, choices = _kind(annotation)
        flag = flags[0] if flags else f"--{name.replace('_', '-')}"
        found.append(Setting(name, flag, helps[name], kind, choices, None, None, None if default is inspect.Parameter.empty else default))
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
    while get_origin(annotation) in (Union, types.UnionType, Annotated):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return "choice", tuple(get_args(annotation))
    if get_origin(annotation) is list:
        return "lines", ()
    return {int: "int", float: "float", bool: "bool"}.get(annotation, "text"), ()
