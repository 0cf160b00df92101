"""The methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.config import FitMethod, Mode
from .attention.ledits import LEdits
from .attention.prompt_to_prompt import DirectInversion, PromptToPrompt, PromptToPromptText
from .blended import BlendedLatentDiffusion
from .diffedit import DiffEdit, DiffEditInMask
from .flows.flowedit import FlowEdit
from .flows.rf_inversion import RFInversion
from .generated import PromptOnly
from .inpaint import Inpaint
from .inversions.ddim import DDIB, DDIMInversion
from .inversions.edit_friendly import EditFriendly
from .inversions.negative_prompt import NegativePromptInversion, ProximalInversion
from .inversions.null_text import NullTextInversion
from .inversions.renoise import ReNoise
from .magicmix import MagicMix, MagicMixText
from .sampled import SamplingConfig, SamplingMethod
from .sdedit import SDEdit

IMAGIC: Mapping[str, Mode] = {"imagic-lora": "lora", "embedding-only": "embedding"}
"""Modes of Imagic by the name of the method; full fine-tuning needs the base in another precision."""
SUBJECT: tuple[FitMethod, ...] = ("dreambooth", "textual-inversion")
"""Methods that learn the subject of the photo, as ``fit`` has them."""
_CLASSES: tuple[type[SamplingMethod[Any]], ...] = (
    PromptOnly,
    SDEdit,
    DDIMInversion,
    DDIB,
    NegativePromptInversion,
    ProximalInversion,
    NullTextInversion,
    EditFriendly,
    ReNoise,
    MagicMix,
    MagicMixText,
    PromptToPrompt,
    PromptToPromptText,
    DirectInversion,
    DiffEdit,
    DiffEditInMask,
    BlendedLatentDiffusion,
    Inpaint,
    LEdits,
    FlowEdit,
    RFInversion,
)
SAMPLING: Mapping[str, type[SamplingMethod[Any]]] = {method.name: method for method in _CLASSES}
"""Methods that only sample with the frozen base, by name."""
GUIDANCE = 3.0
"""Guidance scale at which the embedded base follows prompts, for methods without a fit."""


def default_config(method: type[SamplingMethod[Any]], embedded: bool) -> SamplingConfig:
    """Returns the settings of a method: its own defaults, and on the embedded base its guidance scale.

    The scale of LEDITS++ is that of the guidance towards a concept, and does not depend on the base; those of FlowEdit are a pair.

    Args:
        method: class of the method.
        embedded: whether the base is the embedded one.
    """
    return method.config_class(guidance_scale=GUIDANCE) if embedded and method not in (LEdits, FlowEdit) else method.config_class()
