"""Every setting and its default: the only place with either.

The command line, YAML files, recipes and presets all fill these models. Values are merged in the order built-in < recipe of the base <
preset of the card < file < flags, and only what was given explicitly counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ImagicError

Mode = Literal["lora", "full"]
OptimizerName = Literal["auto", "adam8bit", "adam"]
Timesteps = Literal["stratified", "uniform"]
Preset = Literal["8gb", "12gb", "16gb", "24gb", "cpu"]
PresetOrAuto = Literal["auto", "8gb", "12gb", "16gb", "24gb", "cpu"]
Idle = Literal["keep", "offload", "release"]


def _flag(name: str) -> Parameter:
    return Parameter(name=[f"--{name}"])


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
    timesteps: Timesteps = "stratified"
    """stratified spreads the timesteps of a batch (and of successive steps) evenly; uniform draws them independently."""


class TuneConfig(Config):
    """Stage 2: the denoiser is trained on the photo, the optimised embedding fixed."""

    mode: Annotated[Mode, _flag("mode")] = "lora"
    """lora trains a small PEFT adapter, full the whole denoiser."""
    steps: int = Field(default=300, ge=1, le=100_000)
    """Optimiser steps."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Learning rate of Adam."""
    batch_size: int = Field(default=1, ge=1, le=256)
    """Noise samples of the photo a step, on each process."""
    timesteps: Timesteps = "stratified"
    """As for the embedding."""
    rank: Annotated[int, _flag("rank")] = Field(default=16, ge=1, le=1024)
    """Rank of the LoRA matrices (mode lora)."""
    alpha: Annotated[float | None, _flag("alpha")] = Field(default=None, gt=0, allow_inf_nan=False)
    """LoRA scale times rank; the rank itself where not given (mode lora)."""
    targets: Annotated[Literal["attention", "attention+conv", "all"], _flag("targets")] = "attention"
    """Layers that LoRA adapts: the attention projections, these and the convolutions of the residual blocks, or all (mode lora)."""


class EditConfig(Config):
    """Stage 3: pictures from the interpolated embedding."""

    guidance_scale: float = Field(default=7.5, ge=0, le=50)
    """Classifier-free guidance; 1 and less turn it off. Of a consistency model (LCM) an input, in training as well."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Steps of the sampler."""
    ddim_eta: float = Field(default=0.0, ge=0, le=1)
    """Noise that DDIM adds on its way; 0 is deterministic. Not the eta of Imagic."""
    start: Literal["noise", "image", "inverted"] = "noise"
    """noise samples from scratch; image starts from the photo, noised by strength; inverted from the very noise that gives the photo back,
    which keeps place and surroundings best: DDIM run backwards where ddim_eta is 0, so that the seed has no say, or else noise by the seed,
    with what every step has to add to lead to the photo (edit-friendly inversion), which lets more be changed."""
    source_eta: float = Field(default=0.0, ge=0, le=1)
    """The interpolation under which the photo is inverted, with start inverted: 0 is the optimised embedding. The nearer to where the edit
    sets in, the less of the identity is lost on the way. Edits at a lower eta are inverted under their own."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """How much of the photo is noised away with start image: 1 is all of it."""
    batch_size: int = Field(default=4, ge=1, le=256)
    """Pictures made at once."""


class DeviceConfig(Config):
    """Where and in what precision it runs, and what spares memory while pictures are made."""

    device: Annotated[Literal["auto", "cpu", "cuda"], _flag("device")] = "auto"
    """auto is CUDA where there is one."""
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], _flag("dtype")] = "auto"
    """Precision of the frozen weights and of the arithmetic. On cards without native bf16 auto is fp16, its loss scaled by a constant."""
    attention: Annotated[Literal["sdpa", "xformers"], _flag("attention")] = "sdpa"
    """PyTorch's own attention, or that of xformers (CUDA only)."""
    idle: Annotated[Idle, _flag("idle")] = "keep"
    """Text encoders and VAE while they have nothing to do: keep them on the device, offload them to host memory, or release them and read
    them from the disk when they are needed again. But for keep, the denoiser comes there only after photo and sentence are encoded."""
    vae_tiling: Annotated[bool, _flag("vae-tiling")] = False
    """Encodes and decodes pictures larger than the VAE was made for tile by tile: less memory, slower, a seam now and then."""
    vae_slicing: Annotated[bool, _flag("vae-slicing")] = False
    """Decodes the pictures of a batch one by one."""


class MemoryConfig(DeviceConfig):
    """Where a fit runs, and the memory levers it pulls."""

    gradient_checkpointing: Annotated[bool, _flag("gradient-checkpointing")] = False
    """Recomputes activations in the backward pass instead of keeping them."""
    optimizer: Annotated[OptimizerName, _flag("optimizer")] = "auto"
    """adam8bit keeps its states in 8 bits (bitsandbytes); auto is adam8bit on CUDA, adam on the CPU."""
    optimizer_in_backward: Annotated[bool, _flag("optimizer-in-backward")] = False
    """Steps each weight as soon as its gradient is there, and frees the gradient at once. One process only."""
    autocast_cache: Annotated[bool, _flag("autocast-cache")] = False
    """Keeps the weights that autocast has cast until a pass is over: up to a second copy of the denoiser, in half precision (mode full with
    fp32 master weights)."""
    master_weights: Annotated[Literal["fp32", "bf16-stochastic"], _flag("master-weights")] = "fp32"
    """What is trained in mode full: fp32 weights, or bf16 weights that round at random and so move in the mean (arXiv 2010.06192)."""
    quantize: Annotated[Literal["none", "nf4"], _flag("quantize")] = "none"
    """nf4 holds the linear layers of the frozen denoiser in 4 bits (bitsandbytes, arXiv 2305.14314; mode lora), in later edits as well."""

    @field_validator("master_weights", mode="before")
    @classmethod
    def _not_plain_bf16(cls, value: object) -> object:
        if value in ("bf16", "fp16"):
            raise ValueError(
                f"fp32 or bf16-stochastic: at Imagic's rates a step rounds to nothing in plain {value} (at 5e-7, of 99% of the weights)"
            )
        return value


class CheckpointConfig(Config):
    """How often a fit saves what it has come to; at the end of a stage, and when it is interrupted, it does so anyway."""

    seconds: float = Field(default=300, gt=0, allow_inf_nan=False)
    """At the latest after this many seconds."""
    steps: int | None = Field(default=None, ge=1)
    """And after every so many steps, where given."""


class RunConfig(Config):
    """A whole run: one photo, one sentence."""

    preset: Annotated[PresetOrAuto, _flag("preset")] = "auto"
    """Memory levers for a size of card; auto takes the fastest that fits 90% of the free memory."""
    base: Annotated[str, _flag("base")] = Field(default="sd15", min_length=1)
    """A name (sd15, sd21, sdxl, sdxl-turbo, critters, or one of your own), a folder in diffusers' format, a single .safetensors file, or a
    hub id."""
    revision: Annotated[str | None, _flag("revision")] = None
    """Branch, tag or commit of a hub id."""
    resolution: Annotated[int | None, _flag("resolution")] = Field(default=None, ge=8, le=4096)
    """The photo is worked on at an area of at most this many pixels squared; the base's own where not given."""
    seed: Annotated[int, _flag("seed")] = Field(default=0, ge=0, lt=2**63)
    """Of all that is random in the training."""
    eta: float = Field(default=0.7, ge=0, le=2)
    """Interpolation of the preview, and of an edit that names none: 0 is the photo, 1 the target text."""
    embed: Annotated[EmbedConfig, Parameter(group="Stage 1: embed")] = EmbedConfig()
    tune: Annotated[TuneConfig, Parameter(group="Stage 2: tune")] = TuneConfig()
    edit: Annotated[EditConfig, Parameter(group="Stage 3: the preview, and defaults for later edits")] = EditConfig()
    memory: Annotated[MemoryConfig, Parameter(group="Device and memory")] = MemoryConfig()
    checkpoint: Annotated[CheckpointConfig, Parameter(group="Checkpoints, to go on from after an interruption")] = CheckpointConfig()


Recipe = Mapping[Mode, Mapping[str, Any]]

_CRITTERS: dict[str, Any] = {  # docs/log.md holds what else was tried
    "eta": 0.7,
    "embed": {"steps": 60, "learning_rate": 5e-2},
    "edit": {"guidance_scale": 1.5, "steps": 23, "start": "inverted", "ddim_eta": 1.0, "source_eta": 0.35},
}

RECIPES: dict[str, dict[Mode, dict[str, Any]]] = {
    "sd": {
        "lora": {},
        "full": {"embed": {"steps": 1000, "learning_rate": 2e-3}, "tune": {"steps": 1500, "learning_rate": 5e-7}},
    },
    "critters": {
        "lora": {
            **_CRITTERS,
            "tune": {"steps": 60, "learning_rate": 1e-3, "rank": 4, "targets": "attention+conv"},
        },
        "full": {**_CRITTERS, "tune": {"steps": 60, "learning_rate": 4e-5}},
    },
}
"""Rates and sizes that suit a kind of base, by mode."""

_EMBEDDED_GUIDANCE = 8.0  # at which latent consistency models are shown by their makers (arXiv 2310.04378)

_ROOMY = {"idle": "release", "vae_slicing": True}
_SPARE = {**_ROOMY, "gradient_checkpointing": True}
_TIGHT = {**_SPARE, "optimizer_in_backward": True}

PRESETS: dict[Preset, dict[Mode, dict[str, Any]]] = {
    "24gb": {"lora": {"edit": {"batch_size": 4}}, "full": {"edit": {"batch_size": 4}}},
    "16gb": {"lora": {"memory": _ROOMY, "edit": {"batch_size": 4}}, "full": {"memory": _SPARE, "edit": {"batch_size": 4}}},
    "12gb": {"lora": {"memory": _SPARE, "edit": {"batch_size": 2}}, "full": {"memory": _TIGHT, "edit": {"batch_size": 2}}},
    "8gb": {
        "lora": {"memory": {**_SPARE, "vae_tiling": True}, "edit": {"batch_size": 1}},
        "full": {"memory": {**_TIGHT, "vae_tiling": True}, "edit": {"batch_size": 1}},
    },
    "cpu": {"lora": {"memory": {"device": "cpu"}}, "full": {"memory": {"device": "cpu"}}},
}
"""Memory levers for a size of card, by mode: the most comfortable first."""


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers laid over each other, later ones on top, group by group."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def recipe_of(base: str, few_steps: int | None = None, embeds_guidance: bool = False) -> Recipe:
    """The recipe that suits a base: its own, or that of Stable Diffusion.

    Args:
        few_steps: of a distilled base, how many steps it samples in; it is not guided by an unconditional pass.
        embeds_guidance: the guidance scale is one of its inputs.
    """
    recipe = RECIPES.get(base, RECIPES["sd"])
    if few_steps is None:
        return recipe
    sampling = {"edit": {"steps": few_steps, "guidance_scale": _EMBEDDED_GUIDANCE if embeds_guidance else 0.0}}
    return {mode: merged(settings, sampling) for mode, settings in recipe.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ImagicError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ImagicError(
            f"{path} cannot be read as YAML: {' '.join(str(error).split())}", "a text file of settings", "see configs/ for examples"
        ) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ImagicError(f"{path} holds a {type(found).__name__}", "a mapping of settings", "see configs/ for examples")
    return found


def mode_of(given: Mapping[str, Any]) -> Mode:
    """The mode that settings ask for."""
    tune = given.get("tune")
    return "full" if isinstance(tune, Mapping) and tune.get("mode") == "full" else "lora"


def resolve(flags: Mapping[str, Any], file: Mapping[str, Any], recipe: Recipe, preset: Preset | None = None) -> RunConfig:
    """The settings of a run: built-in < recipe < preset < file < flags.

    Args:
        flags, file: only what was given explicitly, as nested mappings.
        recipe: one of :data:`RECIPES`; the mode that file and flags ask for chooses its half.
        preset: what ``auto`` came to; where not given, the one that file or flags name, and none for ``auto``.

    Raises:
        ImagicError: an unknown name, a value out of range, or two settings that clash.
    """
    given = merged(file, flags)
    mode = mode_of(given)
    chosen = preset or given.get("preset", "auto")
    levers = PRESETS[chosen][mode] if chosen in PRESETS else {}
    asked = {"preset": preset} if preset else {}
    run = checked(merged(recipe.get(mode, {}), levers, given, asked))
    for name, other, right in _clashes(run, given):
        source = "the flags" if name in _named(flags) else "the file"
        flag = "--" + name.replace("_", "-")
        raise ImagicError(f"{flag} (from {source}) together with {other}", right, f"change {other} or leave out {flag}")
    return run


def _clashes(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Settings that would be read and ignored: their name, the flag that rules them out, and what is right."""
    memory, full = run.memory, run.tune.mode == "full"
    mode = f"--mode {run.tune.mode}"
    for name in ("rank", "alpha", "targets"):
        if full and name in _named(given):
            yield name, mode, "LoRA settings with --mode lora only"
    if full and memory.quantize == "nf4":
        yield "quantize", mode, "a quantised denoiser with --mode lora only: 4-bit weights cannot be trained"
    if not full and memory.master_weights != "fp32":
        yield "master_weights", mode, "master weights with --mode full only: LoRA layers are always fp32"
    if not full and memory.autocast_cache:
        yield "autocast_cache", mode, "a cache of cast weights with --mode full only"
    if memory.master_weights != "fp32" and memory.autocast_cache:
        yield "autocast_cache", "--master-weights bf16-stochastic", "a cache of cast weights with fp32 master weights only"
    if memory.master_weights != "fp32" and memory.dtype in ("fp16", "fp32"):
        yield "master_weights", f"--dtype {memory.dtype}", "bf16 weights with bf16 arithmetic"
    for name, start in (("strength", "image"), ("source_eta", "inverted")):
        if name in _named(given) and run.edit.start != start:
            yield name, f"--start {run.edit.start}", f"--start {start} with it"


def _named(given: Mapping[str, Any]) -> set[str]:
    """Names of what is given for the tuning, the memory and the sampling."""
    groups = [given.get(group) for group in ("tune", "memory", "edit")]
    return {name for group in groups if isinstance(group, Mapping) for name in group}


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
    return ImagicError(
        f"{where} = {first['input']!r}", first["msg"].removeprefix("Input should be ").removeprefix("Value error, "), "change that setting"
    )


def _known(location: tuple[int | str, ...]) -> str:
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        kind = group.model_fields[str(part)].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            group = kind
    return "one of " + ", ".join(group.model_fields)
