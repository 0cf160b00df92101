"""Running out of memory, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from .levers import FIT_LEVERS, Levers
from .limits import is_out_of_memory, out_of_memory_error
from .plan import Assumed


@contextmanager
def explain_out_of_memory(
    base: Architecture, run: RunConfig, runtime: Any, stage: str, kept: Callable[[], str] = lambda: "", levers: Levers = FIT_LEVERS
) -> Iterator[None]:
    """Turns running out of memory into an error that says what to do.

    Args:
        runtime: of the loaded base.
        kept: called then; saves what there is and says so.

    Raises:
        ImagicError: as :func:`out_of_memory_error`, in place of whatever the device raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(base, run, assumed_from(runtime), stage, available_memory(runtime.device), kept(), levers) from error


def assumed_from(runtime: Any) -> Assumed:
    """What a plan takes for granted, from what a runtime has decided."""
    names = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return Assumed(runtime.device.type, names[str(runtime.dtype)], runtime.optimizer)


def available_memory(device: Any) -> int:
    """Bytes that PyTorch holds on a card or could still get there; what is free in host memory."""
    from ..core.runtime import free_memory

    if device.type == "cuda":
        import torch

        return free_memory(device) + torch.cuda.memory_reserved(device)
    return free_memory(device)
