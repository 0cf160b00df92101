"""Where a run happens: device and precision as PyTorch's own types, free and peak memory, and the processes that share the batch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from .choices import choose_runtime
from .config import MemoryConfig
from .machine import find_card, free_host_memory

if TYPE_CHECKING:
    from accelerate import PartialState

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """What ``auto`` came to on this machine.

    Args:
        device: where the models are.
        dtype: of frozen weights and arithmetic.
        optimizer: ``adam8bit`` or ``adam``.
        memory: the levers as they were asked for.
        reasons: one sentence for each choice, for people.
    """

    device: torch.device
    dtype: torch.dtype
    optimizer: str
    memory: MemoryConfig
    reasons: dict[str, str]


def resolve_runtime(memory: MemoryConfig) -> Runtime:
    """Decides what ``auto`` means here, and says why.

    Raises:
        ImagicError: CUDA, xformers, bitsandbytes, or bf16 arithmetic is asked for or needed and is not there.
    """
    chosen = choose_runtime(memory, find_card())
    return Runtime(torch.device(chosen.device), DTYPES[chosen.dtype], chosen.optimizer, memory, chosen.reasons)


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may hope for on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: allocated by PyTorch on CUDA, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Starts the count of :func:`peak_memory` anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor from host memory on a device, without waiting for what the device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Processes:
    """The processes of this run: one, or those that ``accelerate launch`` started."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._several = state is not None and state.num_processes > 1
        self.count = state.num_processes if state is not None else 1
        self.rank = state.process_index if state is not None else 0
        self._state = state

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def samples(self, batch: int) -> range:
        """The global indices of this process's samples, where each process has ``batch``."""
        return range(self.rank * batch, (self.rank + 1) * batch)

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes; must be called by all of them."""
        if self._several:
            for tensor in tensors:
                tensor.copy_(_reduced(tensor, "mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of the processes; must be called by all of them."""
        if not self._several or self._state is None:
            return flag
        return bool(_reduced(torch.tensor(float(flag), device=self._state.device), "sum") > 0)


def _reduced(tensor: Tensor, how: str) -> Tensor:
    from accelerate.utils import reduce  # slow to import, and needed with several processes only

    return reduce(tensor, how)  # pyright: ignore[reportReturnType]  # a tensor in, a tensor out
