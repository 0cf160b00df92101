"""The settings of device, precision and memory levers, a part of the models of ``core/config.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Group
from pydantic import field_validator

from .config_group import Config, flag

OptimizerName = Literal["auto", "adam8bit", "adam", "adafactor"]
Idle = Literal["keep", "offload", "release"]

DEVICE_GROUP = Group("Device and memory", sort_key=4)


class DeviceConfig(Config):
    """Device, precision, and the memory levers of an edit."""

    device: Annotated[Literal["auto", "cpu", "cuda"], flag("device")] = "auto"
    """Device to run on. auto: CUDA if a CUDA device is available, otherwise the CPU."""
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], flag("dtype")] = "auto"
    """Precision of the frozen weights and of the computation. auto: bf16 on cards with native bf16, fp16 on older cards, fp32 on the CPU.
    With fp16 the training loss is scaled by a constant."""
    attention: Annotated[Literal["sdpa", "xformers"], flag("attention")] = "sdpa"
    """Attention implementation. sdpa: built into PyTorch. xformers: the xformers package, CUDA only."""
    idle: Annotated[Idle, flag("idle")] = "keep"
    """What happens to the text encoders and the VAE while they are not needed. keep: they stay on the device. offload: they move to host
    memory. release: they are freed, and read from disk when they are needed again. With offload and release the denoiser moves to the
    device only after the photo and the prompt are encoded."""
    vae_tiling: Annotated[bool, flag("vae-tiling")] = False
    """Encode and decode images in tiles if they are larger than the size the VAE was trained for. Needs less memory, is slower, and can
    leave visible seams."""
    vae_slicing: Annotated[bool, flag("vae-slicing")] = False
    """Decode the images of a batch one at a time. Needs less memory."""


class MemoryConfig(DeviceConfig):
    """Device, precision, and the memory levers of a fit."""

    gradient_checkpointing: Annotated[bool, flag("gradient-checkpointing")] = False
    """Recompute activations in the backward pass instead of storing them. Needs less memory, and training steps take longer."""
    optimizer: Annotated[OptimizerName, flag("optimizer")] = "auto"
    """Optimizer of the training. adam: 32-bit states. adam8bit: 8-bit states, needs bitsandbytes and less memory. adafactor: hardly any
    states, and no momentum (arXiv 1804.04235); for stage 2, while stage 1 uses adam. auto: adam8bit on CUDA if bitsandbytes is installed,
    otherwise adam."""
    optimizer_in_backward: Annotated[bool, flag("optimizer-in-backward")] = False
    """Update each weight as soon as its gradient is computed, and free the gradient at once. Needs less memory. Only with one process."""
    autocast_cache: Annotated[bool, flag("autocast-cache")] = False
    """Keep the half-precision copies of the weights that autocast makes until the end of a forward pass. Needs memory for up to a second
    copy of the denoiser in half precision. Only for mode full with fp32 master weights."""
    master_weights: Annotated[Literal["fp32", "bf16-stochastic"], flag("master-weights")] = "fp32"
    """Precision of the weights that mode full trains. fp32: 32-bit weights. bf16-stochastic: bf16 weights with stochastic rounding (arXiv
    2010.06192), in half the memory. Only for mode full."""
    quantize: Annotated[Literal["none", "nf4", "int8"], flag("quantize")] = "none"
    """Quantization of the frozen denoiser, in the fit and in later edits. nf4: its linear layers are stored in 4 bits (arXiv 2305.14314);
    needs bitsandbytes. int8: in 8 bits, each row with a scale of its own, which is more exact. Only for modes lora and embedding."""

    quantize_text: Annotated[Literal["none", "nf4"], flag("quantize-text")] = "none"
    """Quantization of large text encoders, T5 and Qwen3, whose weights are most of the memory while a prompt is encoded. nf4: their linear
    layers are stored in 4 bits, in the fit and in later edits; needs bitsandbytes. CLIP stays as it is."""

    @field_validator("master_weights", mode="before")
    @classmethod
    def _not_plain_bf16(cls, value: object) -> object:
        if value in ("bf16", "fp16"):
            raise ValueError(
                f"fp32 or bf16-stochastic: updates round to zero in plain {value} at Imagic's learning rates (99% of the weights at 5e-7)"
            )
        return value
