"""Every setting and its default: the only place with either.

The command line, YAML files and presets all fill these models. Values are merged in the order built-in < preset < file < flags, and
only what was given explicitly counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ImagicError

Mode = Literal["lora", "full"]
OptimizerName = Literal["auto", "adam8bit", "adam"]
Timesteps = Literal["stratified", "uniform"]


class Config(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EmbedConfig(Config):
    """Stage 1: the text embedding is optimised on the photo, the model frozen."""

    steps: int = Field(default=500, ge=1, le=100_000)
    """Optimiser steps."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Learning rate of Adam."""
    batch_size: int = Field(default=1, ge=1, le=256)
    """Noise samples of the photo a step, on each process."""
    optimizer: OptimizerName = "auto"
    """adam8bit keeps its states in 8 bits (bitsandbytes); auto is adam8bit on CUDA, adam on the CPU."""
    timesteps: Timesteps = "stratified"
    """stratified spreads the timesteps of a batch (and of successive steps) evenly; uniform draws them independently."""


class TuneConfig(Config):
    """Stage 2: the denoiser is trained on the photo, the optimised embedding fixed."""

    mode: Annotated[Mode, Parameter(name=["--mode"])] = "lora"
    """lora trains a small PEFT adapter, full the whole denoiser."""
    steps: int = Field(default=300, ge=1, le=100_000)
    """Optimiser steps."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Learning rate of Adam."""
    batch_size: int = Field(default=1, ge=1, le=256)
    """Noise samples of the photo a step, on each process."""
    optimizer: OptimizerName = "auto"
    """As for the embedding."""
    timesteps: Timesteps = "stratified"
    """As for the embedding."""
    rank: Annotated[int, Parameter(name=["--rank"])] = Field(default=16, ge=1, le=1024)
    """Rank of the LoRA matrices (mode lora)."""
    alpha: Annotated[float | None, Parameter(name=["--alpha"])] = Field(default=None, gt=0, allow_inf_nan=False)
    """LoRA scale times rank; the rank itself where not given (mode lora)."""
    targets: Annotated[Literal["attention", "attention+conv"], Parameter(name=["--targets"])] = "attention"
    """Layers that LoRA adapts: attention projections, or these and the convolutions (mode lora)."""


class EditConfig(Config):
    """Stage 3: pictures from the interpolated embedding."""

    guidance_scale: float = Field(default=7.5, ge=0, le=50)
    """Classifier-free guidance; 1 and less turn it off."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Steps of the sampler."""
    ddim_eta: float = Field(default=0.0, ge=0, le=1)
    """Noise that DDIM adds on its way; 0 is deterministic. Not the eta of Imagic."""
    start: Literal["noise", "image"] = "noise"
    """noise samples from scratch; image starts from the photo, noised by strength."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """How much of the photo is noised away with start image: 1 is all of it."""
    batch_size: int = Field(default=4, ge=1, le=256)
    """Pictures made at once."""


class DeviceConfig(Config):
    """Where and in what precision it runs."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(name=["--device"])] = "auto"
    """auto is CUDA where there is one."""
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], Parameter(name=["--dtype"])] = "auto"
    """Precision of the frozen weights and of the arithmetic; what is trained is always fp32."""
    attention: Annotated[Literal["sdpa", "xformers"], Parameter(name=["--attention"])] = "sdpa"
    """PyTorch's own attention, or that of xformers (CUDA only)."""


class MemoryConfig(DeviceConfig):
    """Where and how a fit runs."""

    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], Parameter(name=["--gradient-checkpointing"])] = "auto"
    """Recomputes activations in the backward pass; auto is on with CUDA."""


class RunConfig(Config):
    """A whole run: one photo, one sentence."""

    base: Annotated[str, Parameter(name=["--base"])] = Field(default="sd15", min_length=1)
    """A name (sd15, sd21, critters), a folder in diffusers' format, or a hub id."""
    revision: Annotated[str | None, Parameter(name=["--revision"])] = None
    """Branch, tag or commit of a hub id."""
    resolution: Annotated[int | None, Parameter(name=["--resolution"])] = Field(default=None, ge=8, le=4096)
    """The photo is worked on at an area of at most this many pixels squared; the base's own where not given."""
    seed: Annotated[int, Parameter(name=["--seed"])] = Field(default=0, ge=0, lt=2**63)
    """Of all that is random in the training."""
    eta: float = Field(default=0.7, ge=0, le=2)
    """Interpolation of the preview, and of an edit that names none: 0 is the photo, 1 the target text."""
    embed: Annotated[EmbedConfig, Parameter(group="Stage 1: embed")] = EmbedConfig()
    tune: Annotated[TuneConfig, Parameter(group="Stage 2: tune")] = TuneConfig()
    edit: Annotated[EditConfig, Parameter(group="Stage 3: the preview, and defaults for later edits")] = EditConfig()
    memory: Annotated[MemoryConfig, Parameter(group="Device and memory")] = MemoryConfig()


PRESETS: dict[str, dict[Mode, dict[str, Any]]] = {
    "sd": {
        "lora": {},
        "full": {"embed": {"steps": 1000, "learning_rate": 2e-3}, "tune": {"steps": 1500, "learning_rate": 5e-7}},
    },
    "critters": {
        "lora": {
            "embed": {"steps": 100, "learning_rate": 2e-2, "batch_size": 8},
            "tune": {"steps": 50, "learning_rate": 1e-3, "batch_size": 8, "rank": 4, "targets": "attention+conv"},
            "edit": {"guidance_scale": 3.0, "steps": 30},
        },
        "full": {
            "embed": {"steps": 100, "learning_rate": 2e-2, "batch_size": 8},
            "tune": {"steps": 60, "learning_rate": 4e-5, "batch_size": 8},
            "edit": {"guidance_scale": 3.0, "steps": 30},
        },
    },
}
"""Settings that suit a kind of base, by mode. A base names its own; ``--preset`` takes another."""


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers laid over each other, later ones on top, group by group."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ImagicError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ImagicError(f"{path} cannot be read as YAML: {error}", "a text file of settings", "see configs/ for examples") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ImagicError(f"{path} holds a {type(found).__name__}", "a mapping of settings", "see configs/ for examples")
    return found


def resolve(flags: Mapping[str, Any], file: Mapping[str, Any], preset: Mapping[Mode, Mapping[str, Any]]) -> RunConfig:
    """The settings of a run: built-in < preset < file < flags.

    Args:
        flags, file: only what was given explicitly, as nested mappings.
        preset: one of :data:`PRESETS`; the mode that file and flags ask for chooses its half.

    Raises:
        ImagicError: an unknown name, a value out of range, or two settings that clash.
    """
    given = merged(file, flags)
    tune = given.get("tune")
    tune = tune if isinstance(tune, Mapping) else {}
    mode: Mode = "full" if tune.get("mode") == "full" else "lora"
    clash = [name for name in ("rank", "alpha", "targets") if name in tune]
    if mode == "full" and clash:
        source = "the flags" if clash[0] in flags.get("tune", {}) else "the file"
        got = f"--{clash[0]} (from {source}) together with --mode full"
        raise ImagicError(got, "LoRA settings with --mode lora only", f"leave out --mode full or --{clash[0]}")
    return checked(merged(preset.get(mode, {}), given))


def checked(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig of these values.

    Raises:
        ImagicError: as :func:`resolve`.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise refusal(error) from error


def refusal(error: ValidationError) -> ImagicError:
    """What is wrong with the first of the values that pydantic refused."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ImagicError(f"unknown setting {where}", _known(first["loc"]), "mend its name or remove it")
    return ImagicError(f"{where} = {first['input']!r}", first["msg"].removeprefix("Input should be "), "change that setting")


def _known(location: tuple[int | str, ...]) -> str:
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        kind = group.model_fields[str(part)].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            group = kind
    return "one of " + ", ".join(group.model_fields)
