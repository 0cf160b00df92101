"""The environment of a run: device and precision as torch types, free and peak memory, and the processes that share a batch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from .choices import choose_runtime
from .device_config import MemoryConfig
from .machine import find_card, free_host_memory, reusable_memory

if TYPE_CHECKING:
    from accelerate import PartialState

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """Device, precision and optimizer of a run on this machine.

    Args:
        device: device of the models.
        dtype: precision of the frozen weights and of the computation.
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``.
        memory: the settings from which the others follow.
        reasons: value and reason of each choice, as text for the user.
    """

    device: torch.device
    dtype: torch.dtype
    optimizer: str
    memory: MemoryConfig
    reasons: dict[str, str]


def resolve_runtime(memory: MemoryConfig) -> Runtime:
    """Replaces every ``auto`` by the value that suits this machine, with reasons.

    Raises:
        ImagicError: as :func:`~imagic_lora.core.choices.choose_runtime`.
    """
    choices = choose_runtime(memory, find_card())
    return Runtime(torch.device(choices.device), DTYPES[choices.dtype], choices.optimizer, memory, choices.reasons)


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes; host memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + reusable_memory("cuda")
    return free_host_memory()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since the start or the last reset: allocated by PyTorch on CUDA, resident set size of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Resets :func:`peak_memory` on CUDA. The peak of the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from host memory to a device, without blocking on CUDA."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Processes:
    """The processes of this run: a single one, or those that ``accelerate launch`` started."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._distributed = state is not None and state.num_processes > 1
        self.count = state.num_processes if state is not None else 1
        self.rank = state.process_index if state is not None else 0
        self._state = state

    @property
    def main(self) -> bool:
        """Whether this is the main process, the only one that writes files."""
        return self.rank == 0

    def samples(self, batch: int) -> range:
        """The indices of this process's samples within the global batch; each process has ``batch`` of them."""
        return range(self.rank * batch, (self.rank + 1) * batch)

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes. All processes must call it."""
        if self._distributed:
            for tensor in tensors:
                tensor.copy_(_reduced(tensor, "mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in any process. All processes must call it."""
        if not self._distributed or self._state is None:
            return flag
        return bool(_reduced(torch.tensor(float(flag), device=self._state.device), "sum") > 0)


def _reduced(tensor: Tensor, reduction: str) -> Tensor:
    from accelerate.utils import reduce  # slow to import, and only needed with several processes

    return reduce(tensor, reduction)  # pyright: ignore[reportReturnType]  # a tensor in, a tensor out
