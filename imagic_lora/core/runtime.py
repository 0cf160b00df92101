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

from .config import MemoryConfig, Timesteps
from .errors import ImagicError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GOLDEN = 0.6180339887498949


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
    device, why_device = _device(memory)
    dtype, why_dtype = _dtype(memory, device)
    _refuse_missing(memory, device, dtype)
    optimizer, why = _optimizer(memory, device)
    reasons = {
        "device": f"{device} ({why_device})",
        "precision": f"{str(dtype).removeprefix('torch.')} ({why_dtype})",
        "attention": f"{memory.attention} ({'asked for' if memory.attention == 'xformers' else 'built into PyTorch'})",
        "optimizer": f"{optimizer} ({why})",
        "memory levers": ", ".join(levers(memory)) or "none",
    }
    return Runtime(device, dtype, optimizer, memory, reasons)


def _optimizer(memory: MemoryConfig, device: torch.device) -> tuple[str, str]:
    if memory.optimizer == "adam8bit":
        _refuse_missing_bitsandbytes("adam8bit", "adam", "--optimizer")
    if memory.optimizer != "auto":
        return memory.optimizer, "asked for"
    if device.type != "cuda":
        return "adam", "memory is not short on the CPU"
    if not has_bitsandbytes():
        return "adam", "bitsandbytes, which would keep states in 8 bits, cannot be imported"
    return "adam8bit", "8-bit states save memory on the card"


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes can be imported."""
    return _bitsandbytes_error() is None


def _bitsandbytes_error() -> Exception | None:
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return error
    return None


def levers(memory: MemoryConfig) -> list[str]:
    """The levers that are pulled, in words."""
    plain = ("gradient_checkpointing", "optimizer_in_backward", "vae_tiling", "vae_slicing", "autocast_cache")
    found = [name.replace("_", " ") for name in plain if getattr(memory, name)]
    found += [f"{memory.idle} what is idle"] if memory.idle != "keep" else []
    found += [f"{memory.master_weights} master weights"] if memory.master_weights != "fp32" else []
    return found + ([f"{memory.quantize} base"] if memory.quantize != "none" else [])


def _refuse_missing(memory: MemoryConfig, device: torch.device, dtype: torch.dtype) -> None:
    cuda = device.type == "cuda"
    if memory.attention == "xformers" and not (cuda and importlib.util.find_spec("xformers")):
        got = "--attention xformers without CUDA" if not cuda else "--attention xformers, which is not installed"
        raise ImagicError(got, "a CUDA device and the xformers package", "use --attention sdpa, or pip install 'imagic-lora[xformers]'")
    if memory.idle == "offload" and not cuda:
        raise ImagicError("--idle offload without CUDA", "a card to make room on", "use --idle release, which spares host memory")
    if memory.master_weights == "bf16-stochastic" and dtype != torch.bfloat16:
        got = f"--master-weights bf16-stochastic with arithmetic in {str(dtype).removeprefix('torch.')}"
        raise ImagicError(got, "bf16 arithmetic", "use --master-weights fp32, or --dtype bf16 where the device has it")
    if memory.autocast_cache and dtype == torch.float32:
        raise ImagicError("--autocast-cache with arithmetic in float32", "fp16 or bf16 arithmetic", "leave it out: nothing is cast in fp32")
    if memory.quantize == "nf4":
        _refuse_missing_bitsandbytes("nf4", "none", "--quantize")


def _refuse_missing_bitsandbytes(asked: str, instead: str, flag: str) -> None:
    if error := _bitsandbytes_error():
        raise ImagicError(
            f"{asked}, but bitsandbytes cannot be imported ({error})",
            "a working bitsandbytes",
            f"pip install bitsandbytes, or use {flag} {instead}",
        ) from error


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
        return DTYPES[memory.dtype], "asked for"
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


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor from host memory on a device, without waiting for what the device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
                tensor.copy_(reduce(tensor, "mean"))  # pyright: ignore[reportArgumentType]  # a tensor in, a tensor out

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of the processes; must be called by all of them."""
        if not self._several or self._state is None:
            return flag
        here = torch.tensor(float(flag), device=self._state.device)
        return bool(reduce(here, "sum") > 0)  # pyright: ignore[reportOperatorIssue]  # a tensor in, a tensor out
