"""Presets: memory levers of a size of card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Mode, Preset
from .merging import merged

_SOME_LEVERS = {"idle": "release", "vae_slicing": True}

_MORE_LEVERS = {**_SOME_LEVERS, "gradient_checkpointing": True}

_MOST_LEVERS = {**_MORE_LEVERS, "optimizer_in_backward": True}


def _by_mode(frozen: dict[str, Any], trained: dict[str, Any], **others: Any) -> dict[Mode, dict[str, Any]]:
    """The settings of a preset by mode.

    Args:
        frozen: memory levers for the modes that freeze the weights of the base.
        trained: memory levers for mode full, which trains them.
        others: groups of settings that all modes have in common.
    """
    frozen_base, trained_base = ({**({"memory": levers} if levers else {}), **others} for levers in (frozen, trained))
    return {"lora": frozen_base, "full": trained_base, "embedding": frozen_base}


PRESETS: dict[Preset, dict[Mode, dict[str, Any]]] = {
    "24gb": _by_mode({}, {}, edit={"batch_size": 4}),
    "16gb": _by_mode(_SOME_LEVERS, _MORE_LEVERS, edit={"batch_size": 4}),
    "12gb": _by_mode(_MORE_LEVERS, _MOST_LEVERS, edit={"batch_size": 2}),
    "8gb": _by_mode({**_MORE_LEVERS, "vae_tiling": True}, {**_MOST_LEVERS, "vae_tiling": True}, edit={"batch_size": 1}),
    "cpu": _by_mode({"device": "cpu"}, {"device": "cpu"}),
}
"""Memory levers for a size of card, by mode; the fastest preset comes first."""

_STOCHASTIC = {"master_weights": "bf16-stochastic", "quantize_text": "nf4"}

LARGE_PRESETS: dict[Preset, dict[Mode, dict[str, Any]]] = {
    "24gb": _by_mode({"gradient_checkpointing": True}, _MOST_LEVERS),
    "16gb": _by_mode({"gradient_checkpointing": True}, {**_MOST_LEVERS, **_STOCHASTIC}),
    "12gb": _by_mode({"quantize_text": "nf4"}, {**_STOCHASTIC, "optimizer": "adafactor"}),
    "8gb": _by_mode({"quantize": "nf4", "quantize_text": "nf4"}, {**_STOCHASTIC, "optimizer": "adafactor"}),
}
"""What the presets set in addition for bases with a text encoder of billions of parameters, whose denoisers are large too."""


def preset_levers(preset: str, mode: Mode, large: bool = False) -> Mapping[str, Any]:
    """The settings of a preset, as nested mappings; none for a name that is no preset.

    Args:
        preset: name of the preset.
        mode: mode of the run.
        large: whether the base has a text encoder of billions of parameters.
    """
    kinds = (PRESETS, LARGE_PRESETS) if large else (PRESETS,)
    return merged(*(kind[preset][mode] for kind in kinds if preset in kind))
