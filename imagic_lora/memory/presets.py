"""Whether a run fits: the preset that does, a refusal before anything is loaded, and what to do where memory ran out."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bases.loading.published import Architecture
from ..core.config import Preset, Recipe, RunConfig, merged, mode_of, resolve
from ..core.errors import ImagicError
from .plan import Assumed, assume, predict
from .unet import NotDrawn

STAGES = ("encode", "embed", "tune", "sample", "decode")
_BY_COMFORT: tuple[Preset, ...] = ("24gb", "16gb", "12gb", "8gb")
_PICTURES = 2**25  # bytes for photo, preview and records
_SHARE = 0.9  # of the free memory that a plan may take
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
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


class OutOfMemory(ImagicError):
    """A run, or a stage of it, does not fit."""


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def on_this_machine(device: str, index: int = 0) -> tuple[Assumed | None, int]:
    """What a card here would be used with, and its free bytes; None and the free host memory where there is no card, or none is wanted.

    PyTorch is asked where it is loaded anyway, and where there are signs of a driver; importing it takes seconds.

    Args:
        index: of the card.
    """
    if device != "cpu" and ("torch" in sys.modules or shutil.which("nvidia-smi") or any(Path(sign).exists() for sign in _DRIVERS)):
        import torch

        from ..core.runtime import has_bitsandbytes

        if torch.cuda.is_available():
            native = torch.cuda.get_device_capability(index) >= (8, 0)
            optimizer = "adam8bit" if has_bitsandbytes() else "adam"
            return Assumed("cuda", "bf16" if native else "fp16", optimizer), torch.cuda.mem_get_info(index)[0]
    import psutil

    return None, psutil.virtual_memory().available


def choose(
    base: Callable[[], Architecture],
    flags: Mapping[str, Any],
    file: Mapping[str, Any],
    recipe: Recipe,
    stages: Sequence[str] = STAGES,
    levers: Levers = FIT_LEVERS,
    processes: tuple[int, int] = (1, 0),
) -> tuple[RunConfig, str]:
    """The settings of a run; where its preset is ``auto``, those of the fastest preset whose plan fits nine tenths of the free memory.

    Args:
        base: gives the architecture, if it comes to that.
        stages: that count.
        levers: that the command has, for what it says if nothing fits.
        processes: how many there are, and the index of this one's card; several cannot step inside the backward pass.

    Returns:
        The settings, their preset filled in, and why it was taken, for people.

    Raises:
        ImagicError: not even the tightest preset fits; as :func:`~imagic_lora.core.config.resolve`.
    """
    plain = resolve(flags, file, recipe)
    if plain.preset != "auto":
        return plain, "asked for"
    card, free = on_this_machine(plain.memory.device, processes[1])
    if card is None and plain.memory.device == "cuda":
        raise ImagicError("--preset auto with --device cuda, but there is no CUDA device here", "a card to look at", "name a --preset")
    if card is None:
        return resolve(flags, file, recipe, "cpu"), "asked for a CPU" if plain.memory.device == "cpu" else "no CUDA device found"
    drawn, tightest = base(), None
    for name in _BY_COMFORT:
        run = resolve(flags, file, recipe, name)
        try:
            plan = predict(drawn, run, planned(run, card))
        except NotDrawn as error:
            return resolve(flags, file, recipe, "8gb"), f"the tightest, since {error.got} cannot be planned"
        stage = max(stages, key=plan.needs)
        need = plan.needs(stage) - plan.context  # the context is there by now
        if processes[0] > 1 and run.memory.optimizer_in_backward:
            continue
        if need <= _SHARE * free:
            return run, f"{gib(need)} predicted for stage {stage}, {gib(free)} free on the card"
        tightest = run, stage
    assert tightest is not None
    run, stage = tightest
    raise too_large(drawn, run, planned(run, card), stage, free, levers=levers)


def choose_for_edit(base: Callable[[], Architecture], made: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The settings that pictures are made with: the adapter's own for sampling, a preset and flags for the machine at hand.

    Args:
        made: the settings of the adapter.
        given: ``edit``, ``memory`` and ``preset`` as asked for.

    Raises:
        ImagicError: as :func:`choose`.
    """
    recipe: Recipe = {"lora": {"resolution": made.resolution, "edit": made.edit.model_dump()}}
    file = {"memory": {"quantize": made.memory.quantize}}
    return choose(base, given, file, recipe, ("encode", "sample", "decode"), EDIT_LEVERS)[0]


def planned(run: RunConfig, card: Assumed | None = None) -> Assumed:
    """What a run's ``auto`` is planned as: on a card with bf16 where none is given."""
    if card is None:
        return assume(run)
    asked, memory = assume(run, card.device), run.memory
    dtype = card.dtype if memory.dtype == "auto" else asked.dtype
    return Assumed(card.device, dtype, card.optimizer if memory.optimizer == "auto" else asked.optimizer)


def refuse_if_too_large(base: Architecture, run: RunConfig, free: int, assumed: Assumed) -> None:
    """Raises before minutes are spent on what cannot end well.

    Raises:
        ImagicError: less is free than the plan's worst stage takes without any allowance.
    """
    try:
        plan = predict(base, run, assumed)
    except NotDrawn:
        return  # it may fit
    stage = max(plan.stages, key=lambda name: plan.stages[name].total)
    if plan.stages[stage].total > free:
        raise too_large(base, run, assumed, stage, free)


def adapter_bytes(base: Architecture, run: RunConfig) -> int | None:
    """Bytes of the adapter that a run will leave; None where the base cannot be drawn."""
    try:
        return predict(base, run, assume(run)).adapter
    except NotDrawn:
        return None


def refuse_full_disk(base: Architecture, run: RunConfig, assumed: Assumed, folder: Path, there: int) -> None:
    """Raises before minutes are spent on what there is no room to store.

    Args:
        folder: what is written lies on the same disk.
        there: bytes of checkpoints that lie there already.

    Raises:
        ImagicError: less is free than the adapter takes with two checkpoints, of which the older goes when the newer is there.
    """
    try:
        plan = predict(base, run, assumed)
    except NotDrawn:
        return
    need, free = plan.adapter + 2 * plan.checkpoint + _PICTURES - there, shutil.disk_usage(folder).free
    if need > free:
        parts = f"the adapter {gib(plan.adapter)}, two checkpoints of {gib(plan.checkpoint)}"
        got = f"{gib(free)} free on the disk of {folder}, and the fit needs {gib(need)} more ({parts})"
        smaller = ", or use --mode lora" if run.tune.mode == "full" else ""
        raise ImagicError(got, "room for both", f"free some space, or choose another --store{smaller}")


def too_large(
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
    except NotDrawn:
        got = f"stage {stage} ran out of memory, with {gib(free)} to be had on {where}" + (f"; {kept}" if kept else "")
        return OutOfMemory(got, "room for every stage", "use --preset 8gb, or a lower --resolution")
    lever = next_lever(base, run, assumed, stage, levers)
    remedy = f"{lever[0]} saves about {gib(lever[1])} there" if lever else "use a lower --resolution, or a device with more memory"
    got = f"stage {stage} needs {gib(plan.needs(stage) - plan.context)} (predicted), and {gib(free)} can be had on {where}"
    return OutOfMemory(got + (f"; {kept}" if kept else ""), "room for every stage", remedy)


def next_lever(base: Architecture, run: RunConfig, assumed: Assumed, stage: str, levers: Levers = FIT_LEVERS) -> tuple[str, int] | None:
    """The next lever that is not yet pulled and lowers a stage by more than a fiftieth, and the bytes that it saves."""
    now = predict(base, run, assumed).needs(stage)
    for flag, change in levers:
        if flag == _STOCHASTIC and assumed.dtype != "bf16":
            continue
        try:
            other = pulled(run, change)
        except ImagicError:  # a lever of the other mode, or one that another rules out
            continue
        optimizer = other.memory.optimizer if other.memory.optimizer != "auto" else assumed.optimizer
        saved = now - predict(base, other, replace(assumed, optimizer=optimizer)).needs(stage)
        if saved > now / 50:
            return flag, saved
    return None


def pulled(run: RunConfig, change: Mapping[str, Any]) -> RunConfig:
    """The run with one lever pulled.

    Raises:
        ImagicError: the lever is of the other mode, or another one rules it out.
    """
    given = merged({"tune": {"mode": run.tune.mode}}, change)
    return resolve(given, {}, {mode_of(given): run.model_dump()})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the machine, had no memory left."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in told for sign in _SIGNS))


@contextmanager
def explained(
    base: Architecture, run: RunConfig, runtime: Any, stage: str, kept: Callable[[], str] = lambda: "", levers: Levers = FIT_LEVERS
) -> Iterator[None]:
    """Turns running out of memory into an error that says what to do.

    Args:
        runtime: of the loaded base.
        kept: called then; saves what there is and says so.

    Raises:
        ImagicError: as :func:`too_large`, in place of whatever the device raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(base, run, assumed_from(runtime), stage, available(runtime.device), kept(), levers) from error


def assumed_from(runtime: Any) -> Assumed:
    """What a plan takes for granted, from what a runtime has decided."""
    names = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return Assumed(runtime.device.type, names[str(runtime.dtype)], runtime.optimizer)


def available(device: Any) -> int:
    """Bytes that PyTorch holds on a card or could still get there; what is free in host memory."""
    from ..core.runtime import free_memory

    if device.type == "cuda":
        import torch

        return free_memory(device) + torch.cuda.memory_reserved(device)
    return free_memory(device)
