"""Recipes: learning rates, steps and sampling settings of a kind of base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..config import FitMethod, Mode
from .merging import merged

RecipePart = Literal["lora", "full", "embedding", "dreambooth-lora", "dreambooth-full", "textual-inversion"]
"""The part of a recipe that applies to a run: that of its mode for method imagic, else that of its method."""
Recipe = Mapping[RecipePart, Mapping[str, Any]]

_CRITTERS: dict[str, Any] = {  # docs/log.md lists the alternatives that were tried
    "eta": 1.0,
    "embed": {"space": "input", "steps": 120, "learning_rate": 3e-3},
    "edit": {"guidance_scale": 2.0, "steps": 23, "start": "inverted", "ddim_eta": 1.0, "source_eta": 0.1, "padding_eta": 0.4},
    "monitoring": {"convergence_every": 10},
}

_CRITTERS_DIT: dict[str, Any] = {**_CRITTERS, "edit": {**_CRITTERS["edit"], "source_eta": 0.4}}  # docs/internals/embedded-base.md

_FLOW: dict[str, Any] = {  # not measured; steps and guidance scale as the cards of Stable Diffusion 3.5 have them
    "embed": {"tokens": "words", "relative": True},
    "edit": {"steps": 28, "guidance_scale": 4.5},
}

_SD3 = _FLOW  # steps and guidance scale are those of its card
_KLEIN = {**_FLOW, "edit": {"steps": 50, "guidance_scale": 4.0}}  # the defaults of diffusers' pipeline
_RATE_OF_DIFFUSERS = {"learning_rate": 1e-4}  # the default of diffusers' LoRA scripts for both; none was measured on one photo

_OTHER_METHODS: dict[RecipePart, dict[str, Any]] = {  # from diffusers' scripts, at batch size 1
    "dreambooth-lora": {"tune": {"steps": 800, "learning_rate": 1e-4}},
    "dreambooth-full": {"tune": {"steps": 800, "learning_rate": 5e-6}},
    "textual-inversion": {"embed": {"steps": 3000, "learning_rate": 2e-3}},
}

_CRITTERS_SAMPLING = {"edit": {"guidance_scale": 3.0, "steps": 23}, "monitoring": {"convergence_every": 10}}

RECIPES: dict[str, dict[RecipePart, dict[str, Any]]] = {
    "sd": {
        "lora": {},
        "full": {"embed": {"steps": 1000, "learning_rate": 2e-3}, "tune": {"steps": 1500, "learning_rate": 5e-7}},
        "embedding": {},
        **_OTHER_METHODS,
    },
    "flow": {
        "lora": _FLOW,
        "full": {**_FLOW, "tune": {"steps": 1500, "learning_rate": 5e-7}},
        "embedding": _FLOW,
    },
    "sd3": {
        "lora": {**_SD3, "tune": _RATE_OF_DIFFUSERS},
        "full": {**_SD3, "tune": {"steps": 1500, "learning_rate": 5e-7}},
        "embedding": _SD3,
    },
    "klein": {
        "lora": {**_KLEIN, "tune": _RATE_OF_DIFFUSERS},
        "full": {**_KLEIN, "tune": {"steps": 1500, "learning_rate": 5e-7}},
        "embedding": _KLEIN,
    },
    "critters": {
        "lora": {
            **_CRITTERS,
            "tune": {"steps": 60, "learning_rate": 1e-3, "rank": 4, "targets": "attention+conv"},
        },
        "full": {**_CRITTERS, "tune": {"steps": 60, "learning_rate": 4e-5}},
        "embedding": _CRITTERS,
        "dreambooth-lora": {
            **_CRITTERS_SAMPLING,
            "tune": {"steps": 300, "learning_rate": 2e-3, "rank": 4, "targets": "attention+conv"},
            "dreambooth": {"class_pictures": 50, "prior_weight": 0.3},
        },
        "dreambooth-full": {
            **_CRITTERS_SAMPLING,
            "tune": {"steps": 300, "learning_rate": 1e-4},
            "dreambooth": {"class_pictures": 50, "prior_weight": 0.3},
        },
        "textual-inversion": {
            **_CRITTERS_SAMPLING,
            "embed": {"steps": 300, "learning_rate": 3e-2},
            "inversion": {"templates": "prompt", "vectors": 4},
        },
    },
    "critters-dit": {
        "lora": {
            **_CRITTERS_DIT,
            "tune": {"steps": 60, "learning_rate": 1e-3, "rank": 4, "targets": "attention+mlp"},
        },
        "full": {**_CRITTERS_DIT, "tune": {"steps": 60, "learning_rate": 4e-5}},
        "embedding": _CRITTERS_DIT,
    },
}
"""Learning rates, steps and sampling settings for a kind of base, by mode."""

_EMBEDDED_GUIDANCE = 8.0  # the value in the paper of latent consistency models (arXiv 2310.04378)


def recipe_of(base: str | None, few_steps: int | None = None, guidance: str = "cfg", kind: str = "sd") -> Recipe:
    """Returns the recipe of a base: its own, or that of its kind.

    Args:
        base: name of the built-in base; None for another base.
        few_steps: number of sampling steps of a distilled base, or None. A distilled base samples without classifier-free guidance.
        guidance: how the base is guided: ``cfg``, ``embedded`` (the scale is an input of the denoiser) or ``none``.
        kind: the kind of architecture, a key of :data:`RECIPES`.
    """
    recipe = RECIPES[base] if base in RECIPES else RECIPES[kind]
    if few_steps is None:
        return recipe
    sampling = {"edit": {"steps": few_steps, "guidance_scale": _EMBEDDED_GUIDANCE if guidance == "embedded" else 0.0}}
    return {part: merged(settings, sampling) for part, settings in recipe.items()}


def recipe_part(method: FitMethod, mode: Mode) -> RecipePart:
    """The part of a recipe for a run."""
    if method == "imagic":
        return mode
    return "textual-inversion" if method == "textual-inversion" else "dreambooth-full" if mode == "full" else "dreambooth-lora"
