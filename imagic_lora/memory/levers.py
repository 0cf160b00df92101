"""Memory levers, cheapest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.settings import merged, mode_of, resolve
from .plan import Assumed, predict

_STOCHASTIC = "--master-weights bf16-stochastic"

Levers = list[tuple[str, dict[str, Any]]]

FIT_LEVERS: Levers = [  # the cheapest in time first
    ("--edit.batch-size 1", {"edit": {"batch_size": 1}}),
    ("--vae-slicing", {"memory": {"vae_slicing": True}}),
    ("--idle release", {"memory": {"idle": "release"}}),
    ("--optimizer adam8bit", {"memory": {"optimizer": "adam8bit"}}),
    ("--optimizer-in-backward", {"memory": {"optimizer_in_backward": True}}),
    ("--gradient-checkpointing", {"memory": {"gradient_checkpointing": True}}),
    ("--embed.batch-size 1 --tune.batch-size 1", {"embed": {"batch_size": 1}, "tune": {"batch_size": 1}}),
    ("--vae-tiling", {"memory": {"vae_tiling": True}}),
    (_STOCHASTIC, {"memory": {"master_weights": "bf16-stochastic"}}),
    ("--quantize nf4", {"memory": {"quantize": "nf4"}}),
    ("--mode lora", {"tune": {"mode": "lora"}, "memory": {"master_weights": "fp32", "autocast_cache": False}}),
]

EDIT_LEVERS: Levers = [
    ("--batch-size 1", {"edit": {"batch_size": 1}}),
    *((flag, change) for flag, change in FIT_LEVERS if flag in ("--vae-slicing", "--idle release", "--vae-tiling")),
]


def next_lever(base: Architecture, run: RunConfig, assumed: Assumed, stage: str, levers: Levers = FIT_LEVERS) -> tuple[str, int] | None:
    """The next lever that is not yet pulled and lowers a stage by more than a fiftieth, and the bytes that it saves."""
    now = predict(base, run, assumed).needs(stage)
    for flag, change in levers:
        if flag == _STOCHASTIC and assumed.dtype != "bf16":
            continue
        try:
            other = with_lever(run, change)
        except ImagicError:  # a lever of the other mode, or one that another rules out
            continue
        optimizer = other.memory.optimizer if other.memory.optimizer != "auto" else assumed.optimizer
        saved = now - predict(base, other, replace(assumed, optimizer=optimizer)).needs(stage)
        if saved > now / 50:
            return flag, saved
    return None


def with_lever(run: RunConfig, change: Mapping[str, Any]) -> RunConfig:
    """The run with one lever pulled.

    Raises:
        ImagicError: the lever is of the other mode, or another one rules it out.
    """
    given = merged({"tune": {"mode": run.tune.mode}}, change)
    return resolve(given, {}, {mode_of(given): run.model_dump()})
