"""Whether a run fits memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.errors import ImagicError
from .levers import FIT_LEVERS, Levers, next_lever
from .plan import Assumed, assume, predict
from .symbolic.layers import NotPlanned

_PICTURES = 2**25  # bytes for photo, preview and records

_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")


class OutOfMemory(ImagicError):
    """A run, or a stage of it, does not fit."""


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def check_memory(base: Architecture, run: RunConfig, free: int, assumed: Assumed) -> None:
    """Raises before minutes are spent on what cannot end well.

    Raises:
        ImagicError: less is free than the plan's worst stage takes without any allowance.
    """
    try:
        plan = predict(base, run, assumed)
    except NotPlanned:
        return  # it may fit
    stage = max(plan.stages, key=lambda name: plan.stages[name].total)
    if plan.stages[stage].total > free:
        raise out_of_memory_error(base, run, assumed, stage, free)


def adapter_bytes(base: Architecture, run: RunConfig) -> int | None:
    """Bytes of the adapter that a run will leave; None where the base cannot be drawn."""
    try:
        return predict(base, run, assume(run)).adapter
    except NotPlanned:
        return None


def check_disk(base: Architecture, run: RunConfig, assumed: Assumed, folder: Path, there: int) -> None:
    """Raises before minutes are spent on what there is no room to store.

    Args:
        folder: what is written lies on the same disk.
        there: bytes of checkpoints that lie there already.

    Raises:
        ImagicError: less is free than the adapter takes with two checkpoints, of which the older goes when the newer is there.
    """
    try:
        plan = predict(base, run, assumed)
    except NotPlanned:
        return
    need, free = plan.adapter + 2 * plan.checkpoint + _PICTURES - there, shutil.disk_usage(folder).free
    if need > free:
        parts = f"the adapter {gib(plan.adapter)}, two checkpoints of {gib(plan.checkpoint)}"
        got = f"{gib(free)} free on the disk of {folder}, and the fit needs {gib(need)} more ({parts})"
        smaller = ", or use --mode lora" if run.tune.mode == "full" else ""
        raise ImagicError(got, "room for both", f"free some space, or choose another --store{smaller}")


def out_of_memory_error(
    base: Architecture, run: RunConfig, assumed: Assumed, stage: str, free: int, kept: str = "", levers: Levers = FIT_LEVERS
) -> OutOfMemory:
    """Names the stage, what it needs and what can be had, and the next lever with what it saves.

    Args:
        free: bytes that the run could have at the most.
        kept: what was saved of the work so far, as a sentence without its full stop.
    """
    where = "the card" if assumed.device == "cuda" else "this machine"
    try:
        plan = predict(base, run, assumed)
    except NotPlanned:
        got = f"stage {stage} ran out of memory, with {gib(free)} to be had on {where}" + (f"; {kept}" if kept else "")
        return OutOfMemory(got, "room for every stage", "use --preset 8gb, or a lower --resolution")
    lever = next_lever(base, run, assumed, stage, levers)
    remedy = f"{lever[0]} saves about {gib(lever[1])} there" if lever else "use a lower --resolution, or a device with more memory"
    got = f"stage {stage} needs {gib(plan.needs(stage) - plan.context)} (predicted), and {gib(free)} can be had on {where}"
    return OutOfMemory(got + (f"; {kept}" if kept else ""), "room for every stage", remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the machine, had no memory left."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in told for sign in _SIGNS))
