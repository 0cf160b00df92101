"""Memory levers: settings that save memory and cost time, the fastest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.settings.merging import merged
from ..core.settings.recipes import recipe_part
from ..core.settings.resolve import mode_of, resolve
from .plan import Assumed
from .prediction import predict
from .symbolic.layers import NotPlanned

_STOCHASTIC = "--master-weights bf16-stochastic"
_WORTHWHILE = 50  # a lever is named if it saves more than one part in so many of the stage

Levers = list[tuple[str, dict[str, Any]]]
"""Flags of the command line, each with the settings that it changes."""

FIT_LEVERS: Levers = [
    ("--edit.batch-size 1", {"edit": {"batch_size": 1}}),
    ("--vae-slicing", {"memory": {"vae_slicing": True}}),
    ("--idle release", {"memory": {"idle": "release"}}),
    ("--optimizer adam8bit", {"memory": {"optimizer": "adam8bit"}}),
    ("--optimizer-in-backward", {"memory": {"optimizer_in_backward": True}}),
    ("--gradient-checkpointing", {"memory": {"gradient_checkpointing": True}}),
    ("--embed.batch-size 1 --tune.batch-size 1", {"embed": {"batch_size": 1}, "tune": {"batch_size": 1}}),
    ("--embed.batch-size 1", {"embed": {"batch_size": 1}}),  # mode embedding excludes the one before
    ("--vae-tiling", {"memory": {"vae_tiling": True}}),
    ("--preview-every 0", {"monitoring": {"preview_every": 0}}),
    (_STOCHASTIC, {"memory": {"master_weights": "bf16-stochastic"}}),
    ("--optimizer adafactor", {"memory": {"optimizer": "adafactor"}}),
    ("--quantize int8", {"memory": {"quantize": "int8"}}),
    ("--quantize nf4", {"memory": {"quantize": "nf4"}}),
    ("--quantize-text nf4", {"memory": {"quantize_text": "nf4"}}),
    ("--mode lora", {"tune": {"mode": "lora"}, "memory": {"master_weights": "fp32", "autocast_cache": False}}),
]
"""Levers of the command ``fit``."""

EDIT_LEVERS: Levers = [
    ("--batch-size 1", {"edit": {"batch_size": 1}}),
    *((flag, change) for flag, change in FIT_LEVERS if flag in ("--vae-slicing", "--idle release", "--vae-tiling")),
]
"""Levers of the command ``edit``."""


def next_lever(base: Architecture, run: RunConfig, assumed: Assumed, stage: str, levers: Levers = FIT_LEVERS) -> tuple[str, int] | None:
    """The first lever that lowers the peak of a stage by more than 2 percent.

    Args:
        base: configs of the base's components.
        run: settings of the run; levers that are active in it save nothing.
        assumed: device, precision and optimizer of the run.
        stage: name of the stage.
        levers: the candidates, the fastest first.

    Returns:
        The flag and the bytes that it saves; None if no lever helps.

    Raises:
        NotPlanned: as :func:`~imagic_lora.memory.prediction.predict`.
    """
    need = predict(base, run, _assumed(run, assumed)).needs(stage)
    for flag, change in levers:
        if flag == _STOCHASTIC and assumed.dtype != "bf16":
            continue
        try:
            changed = with_lever(run, change)
        except ImagicError:  # the settings of this run exclude the lever
            continue
        try:
            plan = predict(base, changed, _assumed(changed, assumed))
        except NotPlanned:  # nobody has rehearsed a flow with this lever
            continue
        saved = need - (plan.needs(stage) if stage in plan.stages else 0)
        if saved > need / _WORTHWHILE:
            return flag, saved
    return None


def _assumed(run: RunConfig, assumed: Assumed) -> Assumed:
    """What is assumed of a run, with the optimizer that it names."""
    return assumed if run.memory.optimizer == "auto" else replace(assumed, optimizer=run.memory.optimizer)


def with_lever(run: RunConfig, change: Mapping[str, Any]) -> RunConfig:
    """A run with one lever active.

    Args:
        run: settings of the run.
        change: the settings of the lever.

    Raises:
        ImagicError: the lever is for the other mode, or conflicts with another setting.
    """
    trains = {} if run.method == "textual-inversion" else {"tune": {"mode": run.tune.mode}}  # which has no mode to choose
    given = merged({"method": run.method}, trains, change)
    return resolve(given, {}, {recipe_part(run.method, mode_of(given)): run.model_dump()})
