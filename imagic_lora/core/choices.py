"""What ``auto`` comes to on a machine, each choice with its reason. No torch here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from .config import MemoryConfig
from .errors import ImagicError
from .machine import Card, bitsandbytes_error

DtypeName = Literal["fp32", "fp16", "bf16"]
_FULL_NAMES: dict[DtypeName, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Choices:
    """Device, precision and optimizer of a run.

    Args:
        device: ``cpu`` or ``cuda:INDEX``.
        dtype: of frozen weights and arithmetic.
        optimizer: ``adam8bit`` or ``adam``.
        reasons: one sentence for each choice, for people.
    """

    device: str
    dtype: DtypeName
    optimizer: str
    reasons: dict[str, str]


def choose_runtime(memory: MemoryConfig, card: Card | None) -> Choices:
    """Decides what ``auto`` means on a machine with this card, or none.

    Raises:
        ImagicError: CUDA, xformers, bitsandbytes, or bf16 arithmetic is asked for or needed and is not there.
    """
    device, why_device = _device(memory, card)
    on_card = card if device != "cpu" else None
    dtype, why_dtype = _dtype(memory, on_card)
    _check_installed(memory, on_card is not None, dtype)
    optimizer, why = _optimizer(memory, on_card is not None)
    reasons = {
        "device": f"{device} ({why_device})",
        "precision": f"{_FULL_NAMES[dtype]} ({why_dtype})",
        "attention": f"{memory.attention} ({'asked for' if memory.attention == 'xformers' else 'built into PyTorch'})",
        "optimizer": f"{optimizer} ({why})",
        "memory levers": ", ".join(levers(memory)) or "none",
    }
    return Choices(device, dtype, optimizer, reasons)


def levers(memory: MemoryConfig) -> list[str]:
    """The levers that are on, in words."""
    plain = ("gradient_checkpointing", "optimizer_in_backward", "vae_tiling", "vae_slicing", "autocast_cache")
    found = [name.replace("_", " ") for name in plain if getattr(memory, name)]
    found += [f"{memory.idle} what is idle"] if memory.idle != "keep" else []
    found += [f"{memory.master_weights} master weights"] if memory.master_weights != "fp32" else []
    return found + ([f"{memory.quantize} base"] if memory.quantize != "none" else [])


def _device(memory: MemoryConfig, card: Card | None) -> tuple[str, str]:
    if memory.device == "cuda" and card is None:
        raise ImagicError("--device cuda, but PyTorch sees no CUDA device", "a CUDA device", "use --device cpu, or see imagic-lora doctor")
    if memory.device == "cpu" or card is None:
        return "cpu", "asked for" if memory.device == "cpu" else "no CUDA device found"
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
        return "adam", "memory is not short on the CPU"
    if bitsandbytes_error():
        return "adam", "bitsandbytes, which would keep states in 8 bits, cannot be imported"
    return "adam8bit", "8-bit states save memory on the card"


def _check_installed(memory: MemoryConfig, cuda: bool, dtype: DtypeName) -> None:
    if memory.attention == "xformers" and not (cuda and importlib.util.find_spec("xformers")):
        got = "--attention xformers without CUDA" if not cuda else "--attention xformers, which is not installed"
        raise ImagicError(got, "a CUDA device and the xformers package", "use --attention sdpa, or pip install 'imagic-lora[xformers]'")
    if memory.idle == "offload" and not cuda:
        raise ImagicError("--idle offload without CUDA", "a card to make room on", "use --idle release, which spares host memory")
    if memory.master_weights == "bf16-stochastic" and dtype != "bf16":
        got = f"--master-weights bf16-stochastic with arithmetic in {_FULL_NAMES[dtype]}"
        raise ImagicError(got, "bf16 arithmetic", "use --master-weights fp32, or --dtype bf16 where the device has it")
    if memory.autocast_cache and dtype == "fp32":
        raise ImagicError("--autocast-cache with arithmetic in float32", "fp16 or bf16 arithmetic", "leave it out: nothing is cast in fp32")
    if memory.quantize == "nf4":
        _check_bitsandbytes("nf4", "none", "--quantize")


def _check_bitsandbytes(asked: str, instead: str, flag: str) -> None:
    if error := bitsandbytes_error():
        raise ImagicError(
            f"{asked}, but bitsandbytes cannot be imported ({error})",
            "a working bitsandbytes",
            f"pip install bitsandbytes, or use {flag} {instead}",
        ) from error
