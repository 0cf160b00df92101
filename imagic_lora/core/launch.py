"""The environment variables of ``accelerate launch`` and ``torchrun``. This module does not import torch."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

from .errors import ImagicError, ImagicWarning

_ADDRESS, _PORT = "MASTER_ADDR", "MASTER_PORT"
_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", _ADDRESS, _PORT)
_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as accelerate reads them
_SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


@dataclass(frozen=True)
class Launch:
    """The processes that a launcher started.

    Args:
        count: number of processes on all machines.
        rank: number of this process, from 0.
        local_rank: number of this process on its machine, from 0; also that of its card.
    """

    count: int = 1
    rank: int = 0
    local_rank: int = 0


def read_launch() -> Launch:
    """Reads the variables that a launcher sets for every process. An empty variable counts as not set.

    Without ``WORLD_SIZE``, or with 1, this is the only process, whatever the other variables say: programs set them for other purposes.

    Raises:
        ImagicError: ``WORLD_SIZE`` is above 1 and another variable is missing; a number is out of range.
    """
    count = _number("WORLD_SIZE", 1, 1, 2**31 - 1)
    if count == 1:
        return Launch()
    if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
        raise _no_launcher(f"WORLD_SIZE is {count}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set")
    _number(_PORT, 0, 1, 65535)
    return Launch(count, _number("RANK", 0, 0, count - 1), _number("LOCAL_RANK", 0, 0, count - 1))


def launched_settings() -> dict[str, str]:
    """Returns the settings of the group ``memory`` that ``accelerate launch`` asks for: ``device`` and ``dtype``.

    Raises:
        ImagicError: a variable has an unknown value, or asks for something that a fit cannot do: DeepSpeed, FSDP, Megatron-LM, fp8.
    """
    if used := [name for name in _SHARDING if _flag(name)]:
        got = f"{used[0]} is set, and a fit shares the batch among its processes, not the model"
        raise ImagicError(got, "plain data parallelism", f"use a configuration from configs/accelerate, or unset {used[0]}")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper()) not in ("", "NO"):
        warnings.warn(f"ACCELERATE_DYNAMO_BACKEND={backend} has no effect: a fit is not compiled", ImagicWarning, stacklevel=2)
    settings = {"device": "cpu"} if _flag("ACCELERATE_USE_CPU") else {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if precision in ("", "no"):
        return settings
    if precision not in ("fp16", "bf16"):
        got = f"ACCELERATE_MIXED_PRECISION is {precision!r}"
        raise ImagicError(got, "no, fp16 or bf16", "use another --mixed_precision of accelerate launch, or unset the variable")
    return settings | {"dtype": precision}


def _number(name: str, default: int, least: int, most: int) -> int:
    """Returns the value of a variable in a range."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise _no_launcher(f"{name} is {text!r}, not a number from {least} to {most}")
    return value


def _flag(name: str) -> bool:
    """Returns whether a switch of accelerate is on."""
    text = os.environ.get(name, "").lower()
    if text and text not in (*_TRUE, *_FALSE):
        raise ImagicError(f"{name} is {text!r}", "true or false", f"correct or unset {name}")
    return text in _TRUE


def _no_launcher(got: str) -> ImagicError:
    remedy = "start the processes with accelerate launch -m imagic_lora, or unset WORLD_SIZE for one process"
    return ImagicError(got, f"all the variables of a launcher ({', '.join(_VARIABLES)}), or none", remedy)
