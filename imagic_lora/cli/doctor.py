"""What this machine has."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..core.config import MemoryConfig
from ..core.runtime import free_memory, resolve_runtime

_NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")


def examine() -> dict[str, dict[str, str]]:
    """Facts by group: ``system``, ``choices`` (with reasons), ``libraries``, ``missing``."""
    runtime = resolve_runtime(MemoryConfig())
    system = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "free memory": f"{free_memory(torch.device('cpu')) / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
    }
    if runtime.device.type == "cuda":
        system["free memory on the card"] = f"{free_memory(runtime.device) / 2**30:.1f} GiB"
    missing = {}
    if importlib.util.find_spec("xformers") is None:
        missing["xformers"] = "optional: pip install 'imagic-lora[xformers]' for --attention xformers (CUDA)"
    if not torch.cuda.is_available():
        missing["CUDA"] = "a photo on Stable Diffusion takes hours on a CPU; the critters base takes seconds"
    return {"system": system, "choices": runtime.reasons, "libraries": {name: _version(name) for name in _NEEDED}, "missing": missing}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
