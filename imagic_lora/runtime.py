"""Where a run happens and with what: device, precision, levers, each with its reason; and noise that is a function of its key."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from .config import MemoryConfig, OptimizerName, Timesteps
from .errors import ImagicError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Runtime:
    """What ``auto`` came to on this machine.

    Args:
        device: where the models are.
        dtype: of frozen weights and arithmetic.
        checkpointing: gradient checkpointing in both stages.
        attention: ``sdpa`` or ``xformers``.
        reasons: one sentence for each choice, for people.
    """

    device: torch.device
    dtype: torch.dtype
    checkpointing: bool
    attention: str
    reasons: dict[str, str]

    def optimizer(self, asked: OptimizerName) -> str:
        """``adam8bit`` or ``adam``."""
        if asked != "auto":
            return asked
        return "adam8bit" if self.device.type == "cuda" else "adam"


def resolve_runtime(memory: MemoryConfig) -> Runtime:
    """Decides what ``auto`` means here, and says why.

    Raises:
        ImagicError: CUDA or xformers is asked for and is not there.
    """
    device, why_device = _device(memory)
    dtype, why_dtype = _dtype(memory, device)
    cuda = device.type == "cuda"
    asked = memory.gradient_checkpointing
    checkpointing = cuda if asked == "auto" else asked == "on"
    why = f"asked for ({asked})" if asked != "auto" else ("saves memory on the card" if cuda else "off on the CPU: it costs time")
    if memory.attention == "xformers" and not (cuda and importlib.util.find_spec("xformers")):
        got = "--attention xformers without CUDA" if not cuda else "--attention xformers, which is not installed"
        raise ImagicError(got, "a CUDA device and the xformers package", "use --attention sdpa, or pip install 'imagic-lora[xformers]'")
    reasons = {
        "device": f"{device} ({why_device})",
        "precision": f"{str(dtype).removeprefix('torch.')} ({why_dtype})",
        "gradient checkpointing": f"{'on' if checkpointing else 'off'} ({why})",
        "attention": f"{memory.attention} ({'asked for' if memory.attention == 'xformers' else 'built into PyTorch'})",
    }
    return Runtime(device, dtype, checkpointing, memory.attention, reasons)


def _device(memory: MemoryConfig) -> tuple[torch.device, str]:
    there = torch.cuda.is_available()
    if memory.device == "cuda" and not there:
        raise ImagicError("--device cuda, but PyTorch sees no CUDA device", "a CUDA device", "use --device cpu, or see imagic-lora doctor")
    if memory.device == "cpu" or not there:
        return torch.device("cpu"), "asked for" if memory.device == "cpu" else "no CUDA device found"
    index = torch.cuda.current_device()
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def _dtype(memory: MemoryConfig, device: torch.device) -> tuple[torch.dtype, str]:
    if memory.dtype != "auto":
        return _DTYPES[memory.dtype], "asked for"
    if device.type == "cpu":
        return torch.float32, "exact, and fast enough on a CPU"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "native on this card"
    return torch.float16, "this card has no native bfloat16"


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may hope for on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


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


def key(*parts: int | str) -> int:
    """A 63-bit seed that depends on all the parts and on nothing else."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise_at(seed: int, stage: str, step: int, samples: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise ``[len(samples), *shape]``, fp32, on the CPU.

    Each sample depends only on ``(seed, stage, step, sample)``, so that a resumed run is the same run, and two processes are one with
    twice the batch.
    """
    generators = (torch.Generator().manual_seed(key(seed, stage, step, sample)) for sample in samples)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def times_at(seed: int, stage: str, step: int, samples: Iterable[int], total: int, kind: Timesteps) -> Tensor:
    """Times ``u`` in [0, 1), ``[len(samples)]`` fp64, for samples of a global batch of ``total``.

    ``stratified`` puts one in each of ``total`` equal parts, all at the same place within their part; from step to step that place moves by
    the golden ratio, which also spreads the times of a batch of one evenly over the steps. ``uniform`` draws each independently.
    """
    if kind == "uniform":
        draws = [key(seed, stage, step, sample, "time") / 2**63 for sample in samples]
        return torch.tensor(draws, dtype=torch.float64)
    start = key(seed, stage, "time") / 2**63
    place = (start + step * _GOLDEN) % 1.0
    return torch.tensor([(sample + place) / total for sample in samples], dtype=torch.float64)


class Processes:
    """The processes of this run: one, or those that ``accelerate launch`` started."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._several = state is not None and state.num_processes > 1
        self.count = state.num_processes if state is not None else 1
        self.rank = state.process_index if state is not None else 0

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
                tensor.copy_(reduce(tensor, "mean"))  # pyright: ignore[reportArgumentType]  # a tensor in, a tensor out
