"""The values that ``auto`` stands for on a machine, each with its reason. This module does not import torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from .device_config import MemoryConfig
from .errors import ImagicError
from .machine import Card, bitsandbytes_error

DtypeName = Literal["fp32", "fp16", "bf16"]
_FULL_NAMES: dict[DtypeName, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Choices:
    """Device, precision and optimizer of a run.

    Args:
        device: ``cpu`` or ``cuda:INDEX``.
        dtype: precision of the frozen weights and of the computation.
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``.
        reasons: value and reason of each choice, as text for the user.
    """

    device: str
    dtype: DtypeName
    optimizer: str
    reasons: dict[str, str]


def choose_runtime(memory: MemoryConfig, card: Card | None) -> Choices:
    """Replaces every ``auto`` by the value that suits a machine.

    Args:
        memory: the settings.
        card: the CUDA device of the machine, or None.

    Raises:
        ImagicError: a setting needs CUDA, xformers, bitsandbytes, or bf16 or half-precision arithmetic that is not available.
    """
    device, why_device = _device(memory, card)
    on_card = card if device != "cpu" else None
    dtype, why_dtype = _dtype(memory, on_card)
    _check_installed(memory, on_card is not None, dtype)
    optimizer, why_optimizer = _optimizer(memory, on_card is not None)
    reasons = {
        "device": f"{device} ({why_device})",
        "precision": f"{_FULL_NAMES[dtype]} ({why_dtype})",
        "attention": f"{memory.attention} ({'asked for' if memory.attention == 'xformers' else 'built into PyTorch'})",
        "optimizer": f"{optimizer} ({why_optimizer})",
        "memory levers": ", ".join(levers(memory)) or "none",
    }
    return Choices(device, dtype, optimizer, reasons)


def levers(memory: MemoryConfig) -> list[str]:
    """The memory levers that are on, as text for the user."""
    switches = ("gradient_checkpointing", "optimizer_in_backward", "vae_tiling", "vae_slicing", "autocast_cache")
    names = [name.replace("_", " ") for name in switches if getattr(memory, name)]
    names += [f"{memory.idle} idle components"] if memory.idle != "keep" else []
    names += [f"{memory.master_weights} master weights"] if memory.master_weights != "fp32" else []
    names += [f"{memory.quantize} base"] if memory.quantize != "none" else []
    return names + ([f"{memory.quantize_text} text encoders"] if memory.quantize_text != "none" else [])


def _device(memory: MemoryConfig, card: Card | None) -> tuple[str, str]:
    if memory.device == "cuda" and card is None:
        raise ImagicError("--device cuda, but PyTorch finds no CUDA device", "a CUDA device", "use --device cpu, or run imagic-lora doctor")
    if memory.device == "cpu" or card is None:
        return "cpu", "no CUDA device found" if card is None else "asked for"
    return f"cuda:{card.index}", card.name


def _dtype(memory: MemoryConfig, card: Card | None) -> tuple[DtypeName, str]:
    if memory.dtype != "auto":
        return memory.dtype, "asked for"
    if card is None:
        return "fp32", "exact, and fast enough on a CPU"
    if card.native_bf16:
        return "bf16", "native on this card"
    return "fp16", "this card has no native bfloat16"


def _optimizer(memory: MemoryConfig, cuda: bool) -> tuple[str, str]:
    if memory.optimizer == "adam8bit":
        _check_bitsandbytes("adam8bit", "adam", "--optimizer")
    if memory.optimizer != "auto":
        return memory.optimizer, "asked for"
    if not cuda:
        return "adam", "8-bit states are not needed on the CPU"
    if bitsandbytes_error():
        return "adam", "bitsandbytes, which adam8bit needs, cannot be imported"
    return "adam8bit", "8-bit states save memory on the card"


def _check_installed(memory: MemoryConfig, cuda: bool, dtype: DtypeName) -> None:
    if memory.attention == "xformers" and not (cuda and importlib.util.find_spec("xformers")):
        got = "--attention xformers without CUDA" if not cuda else "--attention xformers, which is not installed"
        raise ImagicError(got, "a CUDA device and the xformers package", "use --attention sdpa, or pip install 'imagic-lora[xformers]'")
    if memory.idle == "offload" and not cuda:
        raise ImagicError("--idle offload without CUDA", "a CUDA device to offload from", "use --idle release, which frees host memory")
    if memory.master_weights == "bf16-stochastic" and dtype != "bf16":
        got = f"--master-weights bf16-stochastic with arithmetic in {_FULL_NAMES[dtype]}"
        raise ImagicError(got, "bf16 arithmetic", "use --master-weights fp32, or --dtype bf16 if the device supports it")
    if memory.autocast_cache and dtype == "fp32":
        raise ImagicError(
            "--autocast-cache with arithmetic in float32",
            "fp16 or bf16 arithmetic",
            "leave out --autocast-cache: fp32 weights are not cast",
        )
    for flag, value in (("--quantize", memory.quantize), ("--quantize-text", memory.quantize_text)):
        if value == "nf4":
            _check_bitsandbytes("nf4", "none", flag)


def _check_bitsandbytes(value: str, alternative: str, flag: str) -> None:
    if error := bitsandbytes_error():
        raise ImagicError(
            f"{value}, but bitsandbytes cannot be imported ({error})",
            "a working installation of bitsandbytes",
            f"pip install bitsandbytes, or use {flag} {alternative}",
        ) from error
