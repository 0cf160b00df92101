"""What a fit must hold at the least, counted before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from .bases.files import count_parameters
from .config import Mode
from .errors import ImagicError
from .runtime import Runtime, free_memory

_UNLOADED = ("safety_checker", "feature_extractor", "image_encoder")
_STATES = {"adam": 8, "adam8bit": 2}  # bytes a trained parameter


def counted_bytes(folder: Path, component: str, mode: Mode, runtime: Runtime, optimizer: str) -> int:
    """Bytes of the weights of a base, and in mode full of the gradients and the optimiser's states.

    Activations, LoRA layers and the allocator come on top: this is a floor, not a prediction.
    """
    size = torch.finfo(runtime.dtype).bits // 8
    trained = count_parameters(folder, component)
    parts = [part.name for part in folder.iterdir() if part.is_dir() and part.name not in _UNLOADED]
    frozen = sum(count_parameters(folder, part) for part in parts) - trained
    full = 4 + 4 + _STATES[optimizer]  # fp32 master weight, gradient, states
    full += 4 if runtime.device.type == "cpu" else 0  # the copy in host memory that restores the base
    return frozen * size + trained * (full if mode == "full" else size)


def refuse_if_too_large(needed: int, runtime: Runtime, mode: Mode) -> None:
    """Raises before minutes are spent on what cannot end well.

    Raises:
        ImagicError: less memory is free than the counted bytes.
    """
    free = free_memory(runtime.device)
    if needed > free:
        remedy = "use --mode lora" if mode == "full" else "free memory on the device or use a smaller base"
        raise ImagicError(
            f"{free / 2**30:.1f} GiB are free on {runtime.device}", f"at least {needed / 2**30:.1f} GiB for --mode {mode}", remedy
        )
