"""Validates settings, of a YAML file or any source, and explains what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..config import RunConfig
from ..errors import ImagicError
from ..validation import first_problem
from ..yaml_files import read_yaml


def read_settings(path: Path) -> dict[str, Any]:
    """Reads and validates the settings of a YAML file, as nested mappings. An empty file has none.

    Raises:
        ImagicError: as :func:`~imagic_lora.core.yaml_files.read_yaml`; an unknown name or a value out of range.
    """
    settings = read_yaml(path)
    try:
        RunConfig.model_validate(settings)
    except ValidationError as error:
        found = settings_error(error)
        raise ImagicError(f"{path}: {found.got}", found.expected, found.remedy) from error
    return settings


def validated(values: Mapping[str, Any]) -> RunConfig:
    """Validates nested settings and returns them as a RunConfig.

    Raises:
        ImagicError: an unknown name or a value out of range.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error) from error


def settings_error(error: ValidationError) -> ImagicError:
    """Converts the first error of a pydantic validation into an ImagicError."""
    problem = first_problem(error)
    if problem.kind == "extra_forbidden":
        return ImagicError(f"unknown setting {'.'.join(map(str, problem.place))}", _known(problem.place), "correct its name or remove it")
    return ImagicError(problem.got, problem.expected, "change that setting")


def _known(location: tuple[int | str, ...]) -> str:
    """The names that are valid where pydantic found an unknown one."""
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        annotation = group.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            group = annotation
    return "one of " + ", ".join(group.model_fields)
