"""Whether a run fits: the preset that does, a refusal before anything is loaded, and what to do where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import Preset, RunConfig
from ..core.errors import ImagicError
from ..core.machine import bitsandbytes_error, find_card, free_host_memory
from ..core.settings import Recipe, resolve
from .levers import EDIT_LEVERS, FIT_LEVERS, Levers
from .limits import gib, out_of_memory_error
from .plan import Assumed, assume, predict
from .symbolic.layers import NotPlanned

STAGES = ("encode", "embed", "tune", "sample", "decode")
_BY_COMFORT: tuple[Preset, ...] = ("24gb", "16gb", "12gb", "8gb")
_SHARE = 0.9  # of the free memory that a plan may take


def card_and_free_memory(device: str, index: int = 0) -> tuple[Assumed | None, int]:
    """What a card here would be used with, and its free bytes; None and the free host memory where there is no card, or none is wanted.

    Args:
        index: of the card.
    """
    card = find_card(index) if device != "cpu" else None
    if card is None:
        return None, free_host_memory()
    return Assumed("cuda", "bf16" if card.native_bf16 else "fp16", "adam" if bitsandbytes_error() else "adam8bit"), card.free


def choose_preset(
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
    card, free = card_and_free_memory(plain.memory.device, processes[1])
    if card is None and plain.memory.device == "cuda":
        raise ImagicError("--preset auto with --device cuda, but there is no CUDA device here", "a card to look at", "name a --preset")
    if card is None:
        return resolve(flags, file, recipe, "cpu"), "asked for a CPU" if plain.memory.device == "cpu" else "no CUDA device found"
    drawn, tightest = base(), None
    for name in _BY_COMFORT:
        run = resolve(flags, file, recipe, name)
        try:
            plan = predict(drawn, run, assumed_for(run, card))
        except NotPlanned as error:
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
    raise out_of_memory_error(drawn, run, assumed_for(run, card), stage, free, levers=levers)


def choose_preset_for_edit(base: Callable[[], Architecture], made: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The settings that pictures are made with: the adapter's own for sampling, a preset and flags for the machine at hand.

    Args:
        made: the settings of the adapter.
        given: ``edit``, ``memory`` and ``preset`` as asked for.

    Raises:
        ImagicError: as :func:`choose_runtime`.
    """
    recipe: Recipe = {"lora": {"resolution": made.resolution, "edit": made.edit.model_dump()}}
    file = {"memory": {"quantize": made.memory.quantize}}
    return choose_preset(base, given, file, recipe, ("encode", "sample", "decode"), EDIT_LEVERS)[0]


def assumed_for(run: RunConfig, card: Assumed | None = None) -> Assumed:
    """What a run's ``auto`` is planned as: on a card with bf16 where none is given."""
    if card is None:
        return assume(run)
    asked, memory = assume(run, card.device), run.memory
    dtype = card.dtype if memory.dtype == "auto" else asked.dtype
    return Assumed(card.device, dtype, card.optimizer if memory.optimizer == "auto" else asked.optimizer)
