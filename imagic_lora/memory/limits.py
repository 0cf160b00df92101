"""Checks that a run fits the memory and the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.errors import DiskFull, ImagicError
from .levers import EDIT_LEVERS, FIT_LEVERS, Levers, next_lever
from .plan import Assumed, assume
from .prediction import predict
from .symbolic.layers import NotPlanned

_SMALL_FILES = 2**25  # bytes allowed for canvas, preview and records

_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")  # in messages of CUDA and PyTorch

_OTHER_REMEDY = "use a lower --resolution, or a device with more memory"  # where no lever is left
_OTHER_REMEDY_EDIT = "close other programs that use the device, or use one with more memory"  # the adapter determines the resolution


class OutOfMemory(ImagicError):
    """A run, or a stage of it, does not fit the memory."""


def gib(size: float) -> str:
    """Formats a number of bytes as GiB, or as MiB below 0.1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def check_memory(base: Architecture, run: RunConfig, free: int, assumed: Assumed, photos: int = 1) -> None:
    """Checks before anything is loaded that every stage fits the free memory. A base that cannot be planned passes.

    Args:
        base: configs of the base's components.
        run: settings of the run.
        free: free bytes on the device.
        assumed: device, precision and optimizer of the run.
        photos: number of photos that are fitted together.

    Raises:
        OutOfMemory: a stage needs more than the free memory, allowances not included.
    """
    try:
        plan = predict(base, run, assumed, photos)
    except NotPlanned:
        return
    stage = max(plan.stages, key=lambda name: plan.stages[name].total)
    if plan.stages[stage].total > free:
        raise out_of_memory_error(base, run, assumed, stage, free, photos=photos)


def adapter_bytes(base: Architecture, run: RunConfig) -> int | None:
    """Bytes of the adapter that a run stores; None where the base cannot be planned."""
    try:
        return predict(base, run, assume(run)).adapter
    except NotPlanned:
        return None


def check_disk(base: Architecture, run: RunConfig, assumed: Assumed, folder: Path, existing: int, photo: int = 0, photos: int = 1) -> None:
    """Checks that the disk has room for the adapter and two checkpoints: the old one is deleted after the new one is written.

    Args:
        base: configs of the base's components; one that cannot be planned passes.
        run: settings of the run.
        assumed: device, precision and optimizer of the run.
        folder: an existing folder on the disk that is written to.
        existing: bytes of checkpoints that are on the disk already.
        photo: bytes of the photo's file that the adapter keeps; of all files of photos that are fitted together.
        photos: number of photos that are fitted together, each with an adapter and checkpoints of its own.

    Raises:
        DiskFull: the disk has too little free space.
    """
    try:
        plan = predict(base, run, assumed)
    except NotPlanned:
        return
    need = photos * (plan.adapter + 2 * plan.checkpoint + _SMALL_FILES) + photo - existing
    free = shutil.disk_usage(folder).free
    if need > free:
        parts = f"the adapter {gib(plan.adapter)}, two checkpoints of {gib(plan.checkpoint)}"
        fits = "the fit needs" if photos == 1 else f"the fits of {photos} photos need"
        got = f"{gib(free)} free on the disk of {folder}, and {fits} {gib(need)} more ({parts}{'' if photos == 1 else ', each'})"
        smaller = ", or use --mode lora" if run.tune.mode == "full" else ""
        raise DiskFull(got, "disk space for the adapter and both checkpoints", f"free some space, or choose another --store{smaller}")


def out_of_memory_error(
    base: Architecture,
    run: RunConfig,
    assumed: Assumed,
    stage: str,
    free: int,
    note: str = "",
    levers: Levers = FIT_LEVERS,
    photos: int = 1,
) -> OutOfMemory:
    """The error for a stage that does not fit: it names the stage, its need, the available memory and the next lever with its saving.

    Args:
        base: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer of the run.
        stage: name of the stage.
        free: bytes that are available to the run.
        note: added to the message, without a full stop, such as what is saved; "" for none.
        levers: memory levers of the command.
        photos: number of photos that are fitted together; with more than one, fewer are the remedy.
    """
    place, suffix = "the card" if assumed.device == "cuda" else "this machine", f"; {note}" if note else ""
    other = _OTHER_REMEDY_EDIT if levers == EDIT_LEVERS else _OTHER_REMEDY
    together = "" if photos == 1 else f" with {photos} photos together"
    try:
        plan = predict(base, run, assumed, photos)
    except NotPlanned:
        got = f"stage {stage}{together} ran out of memory, with {gib(free)} available on {place}{suffix}"
        remedy = "fit fewer photos together" if together else f"use --preset 8gb; or {other}"
        return OutOfMemory(got, "enough memory for every stage", remedy)
    lever = None if together else next_lever(base, run, assumed, stage, levers)
    other = "fit fewer photos together" if together else other
    remedy = f"{lever[0]} saves about {gib(lever[1])} in this stage" if lever else other
    need = gib(plan.needs(stage) - plan.context)
    got = f"stage {stage}{together} needs {need} (predicted), and {gib(free)} is available on {place}{suffix}"
    return OutOfMemory(got, "enough memory for every stage", remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the machine has no free memory left."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(part in message for part in _OUT_OF_MEMORY))
