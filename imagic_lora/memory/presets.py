"""Chooses the fastest preset that fits the free memory of this machine."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import Mode, Preset, RunConfig
from ..core.errors import ImagicError
from ..core.machine import bitsandbytes_error, find_card, free_host_memory
from ..core.settings.recipes import Recipe
from ..core.settings.resolve import resolve
from .levers import EDIT_LEVERS, FIT_LEVERS, Levers
from .limits import gib, out_of_memory_error
from .plan import Assumed, Plan, assume
from .prediction import predict
from .symbolic.layers import NotPlanned

_FASTEST_FIRST: tuple[Preset, ...] = ("24gb", "16gb", "12gb", "8gb")
_SHARE = 0.9  # of the free memory that a plan may use
_MAX_BATCH = 16  # a larger one is hardly faster on any device
_MAX_TOGETHER = 64  # photos in a batch
EDIT_STAGES = ("encode", "sample", "decode")
"""The stages of a plan that an edit runs."""


def card_and_free_memory(device: str, index: int = 0) -> tuple[Assumed | None, int]:
    """Looks for a card and its free memory.

    Args:
        device: setting of the run: ``auto``, ``cuda`` or ``cpu``.
        index: of the card.

    Returns:
        What ``auto`` means on the card, and its free bytes. For ``cpu``, and on a machine without a card, None and the free host memory.
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
    stages: Sequence[str] | None = None,
    levers: Levers = FIT_LEVERS,
    processes: tuple[int, int] = (1, 0),
    large: bool = False,
    rehearse: Callable[[Architecture, RunConfig, Assumed], Plan] | None = None,
) -> tuple[RunConfig, str]:
    """Resolves the settings of a run; preset ``auto`` becomes the fastest preset whose plan fits 90 percent of the free memory.

    Args:
        base: returns the configs of the base's components; called only if a plan is needed.
        flags: settings from the command line.
        file: settings from a YAML file.
        recipe: settings that the base recommends.
        stages: the stages that have to fit; None for all of the plan.
        levers: memory levers of the command, for the error message.
        processes: number of processes, and the index of this one's card. Several processes exclude presets with the optimizer inside the
            backward pass.
        large: whether the base has a text encoder of billions of parameters.
        rehearse: plans what :func:`~imagic_lora.memory.prediction.predict` cannot. Without it, ``auto`` is then the preset with the lowest
            peak.

    Returns:
        The settings with their preset, and the reason for the preset as text.

    Raises:
        ImagicError: no preset fits; or as :func:`~imagic_lora.core.settings.resolve.resolve`.
    """
    plain = resolve(flags, file, recipe, large=large)
    if plain.preset != "auto":
        return plain, "asked for"
    card, free = card_and_free_memory(plain.memory.device, processes[1])
    if card is None and plain.memory.device == "cuda":
        raise ImagicError("--preset auto with --device cuda, but no CUDA device was found", "a CUDA device", "choose a --preset")
    if card is None:
        return resolve(flags, file, recipe, "cpu", large), "asked for a CPU" if plain.memory.device == "cpu" else "no CUDA device found"
    architecture, tightest = base(), None
    for name in _FASTEST_FIRST:
        run = resolve(flags, file, recipe, name, architecture.has_large_encoder)
        assumed = assumed_for(run, card)
        if run.memory.master_weights != "fp32" and assumed.dtype != "bf16":
            continue
        try:
            plan = predict(architecture, run, assumed, edit=stages is not None)
        except NotPlanned as error:
            if architecture.process == "flow" and rehearse is not None:
                plan = rehearse(architecture, run, assumed)
            else:
                lowest = resolve(flags, file, recipe, "8gb", architecture.has_large_encoder)
                return lowest, f"the lowest peak, since the memory of {error.got} cannot be predicted"
        stage = max(stages or plan.stages, key=plan.needs)
        need = plan.needs(stage) - plan.context  # the free memory was read with the context in place
        if processes[0] > 1 and run.memory.optimizer_in_backward:
            continue
        if need <= _SHARE * free:
            return run, f"{gib(need)} predicted for stage {stage}, {gib(free)} free on the card"
        tightest = run, stage
    assert tightest is not None
    run, stage = tightest
    note = f"--preset auto uses at most {_SHARE:.0%} of it"
    raise out_of_memory_error(architecture, run, assumed_for(run, card), stage, free, note, levers)


def choose_preset_for_edit(base: Callable[[], Architecture], adapter_run: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """Resolves the settings of an edit: sampling settings from the adapter, memory settings for this machine.

    Args:
        base: returns the configs of the base's components; called only if a plan is needed.
        adapter_run: settings that the adapter was trained with.
        given: explicit settings of the groups ``edit`` and ``memory``, and ``preset``; they override the adapter's.

    Raises:
        ImagicError: as :func:`choose_preset`.
    """
    # an edit opens the base without master weights, so full weights take the memory of the base's own, and are planned as LoRA
    mode: Mode = "embedding" if adapter_run.tune.mode == "embedding" else "lora"
    recipe: Recipe = {mode: {"resolution": adapter_run.resolution, "edit": adapter_run.edit.model_dump()}}
    memory = adapter_run.memory
    file = {"tune": {"mode": mode}, "memory": {"quantize": memory.quantize, "quantize_text": memory.quantize_text}}
    return choose_preset(base, given, file, recipe, EDIT_STAGES, EDIT_LEVERS)[0]


def largest_batch(base: Architecture, run: RunConfig, assumed: Assumed, free: int, images: int) -> int:
    """Returns the largest batch size of stage 3, up to a number of images, whose predicted peak fits 90 percent of the free memory.

    It is the batch size of the run, or that times a power of two; that of the run where its memory cannot be predicted.

    Args:
        base: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer of the run.
        free: free bytes on the device before anything is loaded.
        images: number of images that are generated.
    """
    size = run.edit.batch_size
    try:
        while size < images and 2 * size <= _MAX_BATCH:
            larger = run.model_copy(update={"edit": run.edit.model_copy(update={"batch_size": 2 * size})})
            plan = predict(base, larger, assumed, edit=True)
            if max(plan.needs(stage) for stage in EDIT_STAGES) - plan.context > _SHARE * free:
                break
            size *= 2
    except NotPlanned:
        pass
    return size


def most_together(base: Architecture, run: RunConfig, assumed: Assumed, free: int, photos: int) -> int:
    """Returns how many photos can be fitted together: the most, up to a number, whose predicted peak fits 90 percent of the free memory.

    Args:
        base: configs of the base's components. Where its memory cannot be predicted, one photo is fitted at a time.
        run: settings of the fits; those of mode full, and of other methods than imagic, are not fitted together.
        assumed: device, precision and optimizer of the fits.
        free: free bytes on the device before anything is loaded.
        photos: number of photos, at least 1.
    """
    if run.method != "imagic" or run.tune.mode == "full" or run.memory.optimizer_in_backward:
        return 1

    def fits(count: int) -> bool:
        plan = predict(base, run, assumed, count)
        return plan.peak_bytes - plan.context <= _SHARE * free

    try:
        return max(1, bisect_right(range(1, min(photos, _MAX_TOGETHER) + 1), 0, key=lambda count: not fits(count)))
    except NotPlanned:
        return 1


def assumed_for(run: RunConfig, card: Assumed | None = None) -> Assumed:
    """Replaces every ``auto`` of a run by what it means on a card.

    Args:
        run: explicit settings are kept.
        card: from :func:`card_and_free_memory`; None for :func:`~imagic_lora.memory.plan.assume`.
    """
    if card is None:
        return assume(run)
    asked, memory = assume(run, card.device), run.memory
    dtype = card.dtype if memory.dtype == "auto" else asked.dtype
    return Assumed(card.device, dtype, card.optimizer if memory.optimizer == "auto" else asked.optimizer)
