"""Converts an out-of-memory exception into an error that names the stage and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from .levers import FIT_LEVERS, Levers
from .limits import is_out_of_memory, out_of_memory_error
from .plan import Assumed

_DTYPE_NAMES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


@contextmanager
def explain_out_of_memory(
    base: Architecture,
    run: RunConfig,
    runtime: Any,
    stage: str,
    kept: Callable[[], str] = lambda: "",
    levers: Levers = FIT_LEVERS,
    photos: int = 1,
) -> Iterator[None]:
    """Converts an out-of-memory exception of the code inside into :class:`~imagic_lora.memory.limits.OutOfMemory`.

    Args:
        base: configs of the base's components.
        run: settings of the run.
        runtime: the :class:`~imagic_lora.core.runtime.Runtime` of the loaded base.
        stage: name of the stage that runs inside.
        kept: called only when memory runs out; returns a statement of what is saved, without a full stop, or "".
        levers: memory levers of the command.
        photos: number of photos that are fitted together.

    Raises:
        OutOfMemory: memory ran out. Other exceptions pass unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        free = available_memory(runtime.device)
        raise out_of_memory_error(base, run, assumed_from(runtime), stage, free, kept(), levers, photos) from error


def assumed_from(runtime: Any) -> Assumed:
    """Device, precision and optimizer of a :class:`~imagic_lora.core.runtime.Runtime`, for a plan."""
    return Assumed(runtime.device.type, _DTYPE_NAMES[str(runtime.dtype)], runtime.optimizer)


def available_memory(device: Any) -> int:
    """Bytes that PyTorch can use on a ``torch.device``: reserved and free memory of a card, free host memory of a CPU."""
    from ..core.runtime import free_memory

    if device.type == "cuda":
        import torch

        return free_memory(device) + torch.cuda.memory_reserved(device)
    return free_memory(device)
