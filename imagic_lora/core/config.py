"""Every setting and its default: the only place with either.

The command line, YAML files, recipes and presets all fill these models. Values are merged in the order built-in < recipe of the base <
preset of the card < file < flags, and only what was given explicitly counts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, field_validator

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
