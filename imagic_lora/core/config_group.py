"""What every group of settings has in common: frozen models that reject unknown names, and flags on the command line."""

from __future__ import annotations

from typing import Any, get_args

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def flag(name: str) -> Parameter:
    """The flag of a setting on the command line, without the name of its group."""
    return Parameter(name=[f"--{name}"])


class Config(BaseModel):
    """A frozen group of settings that rejects unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("a number")  # pydantic would read true as 1
        return value
