"""The methods that CritterBench compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..core.config import EditConfig, FitMethod, Mode, RunConfig
from ..core.errors import ImagicError
from ..core.settings import RECIPES, read_settings, resolve
from ..core.text import exact
from ..methods.catalogue import GUIDANCE, SAMPLING, default_config
from ..methods.generated import PromptOnly
from ..methods.imagic import Imagic
from ..methods.sampled import SamplingMethod
from ..methods.sdedit import SDEdit, SDEditConfig
from ..methods.subject import SubjectMethod
from .bounds import Bounds
from .runner import Benched

RECIPE_FILES = Path(__file__).parent
STRENGTHS = (0.5, 0.65, 0.8, 0.9)
STARTS: dict[str, dict[str, Any]] = {
    "noise": {"edit": {"start": "noise"}},
    "image": {"edit": {"start": "image"}},
}
"""Settings of the starts that are not the default of the embedded base."""


def defaults(mode: Mode, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Returns the settings of a run on the embedded base: the recipe of a mode with some changes.

    Args:
        mode: lora, full or embedding.
        changes: settings that override the recipe, as nested mappings.
    """
    return resolve({"base": "critters", "tune": {"mode": mode}}, changes or {}, RECIPES["critters"])


def budgeted(mode: Mode, times: float) -> RunConfig:
    """Returns the defaults with another training budget.

    The number of steps of both stages is multiplied by a factor and their learning rates are divided by it, so their product is constant.

    Args:
        mode: lora, full or embedding.
        times: the factor, above 0.
    """
    config = defaults(mode)
    changes: dict[str, Any] = {}
    for stage in config.stages:
        default = getattr(config, stage)
        changes[stage] = {"steps": max(1, round(default.steps * times)), "learning_rate": default.learning_rate / times}
    return defaults(mode, changes)


def other_starts(mode: Mode) -> dict[str, tuple[float, EditConfig]]:
    """Returns eta and settings for an edit that starts from noise, and for one that starts from the noised photo.

    Edit-friendly inversion, the default, reproduces the photo by itself. These starts show what the fit alone keeps.
    """
    configs = {start: defaults(mode, changes) for start, changes in STARTS.items()}
    return {start: (config.eta, config.edit) for start, config in configs.items()}


def sampling(name: str) -> SamplingMethod[Any]:
    """Returns a method without a fit with its own defaults, at the guidance scale of the embedded base.

    The row of a method that needs a mask ends in ``-given``: it gets the mask of :func:`~imagic_lora.bench.cases.given_mask`.

    Args:
        name: name of the method.
    """
    method = SAMPLING[name]
    row = f"{name}-given" if "mask" in method.requires else name
    return method({row: default_config(method, embedded=True)})


def prompt_only() -> PromptOnly:
    """Returns the method that samples from noise, with as many steps as the edits of Imagic."""
    return PromptOnly({"prompt-only": PromptOnly.config_class(steps=defaults("lora").edit.steps, guidance_scale=GUIDANCE)})


def sdedit() -> SDEdit:
    """Returns SDEdit with a row for each of :data:`STRENGTHS`, with as many steps as the edits of Imagic."""
    steps = defaults("lora").edit.steps
    return SDEdit(
        {f"sdedit-{exact(strength)}": SDEditConfig(steps=steps, guidance_scale=GUIDANCE, strength=strength) for strength in STRENGTHS}
    )


def reference(name: str, file: str) -> Imagic:
    """Returns Imagic with a recipe from the YAML files in this folder, on the embedded base at its own resolution.

    Args:
        name: name of the method.
        file: name of the YAML file.
    """
    return Imagic(name, resolve({"base": "critters", "resolution": None}, read_settings(RECIPE_FILES / file), {}))


def subject(method: FitMethod) -> SubjectMethod:
    """Returns DreamBooth, as LoRA, or textual inversion with the recipe of the embedded base."""
    return SubjectMethod(resolve({"base": "critters", "method": method}, {}, RECIPES["critters"]))


CATALOGUE: dict[str, Callable[[], Benched]] = {
    "bounds": Bounds,
    "prompt-only": prompt_only,
    "sdedit": sdedit,
    "imagic-lora": lambda: Imagic("imagic-lora", defaults("lora"), other_starts("lora")),
    "imagic-full": lambda: Imagic("imagic-full", defaults("full")),
    "embedding-only": lambda: Imagic("embedding-only", defaults("embedding"), other_starts("embedding")),
    "reference": lambda: reference("reference", "reference-imagic.yaml"),
    "reference-retuned": lambda: reference("reference-retuned", "reference-imagic-retuned.yaml"),
    **{name: partial(sampling, name) for name in SAMPLING if name not in ("prompt-only", "sdedit") and "unet" in SAMPLING[name].supports},
    "dreambooth": lambda: subject("dreambooth"),
    "textual-inversion": lambda: subject("textual-inversion"),
}


def chosen(names: str | None) -> list[Benched]:
    """Returns the methods of a list, in its order and without duplicates.

    Args:
        names: names of methods, separated by commas; None is all of them.

    Raises:
        ImagicError: a name is not in the catalogue.
    """
    selected = list(CATALOGUE) if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in selected:
        if name not in CATALOGUE:
            raise ImagicError(
                f"--methods {name}", f"one or more of {', '.join(CATALOGUE)}, separated by commas", "correct the list of methods"
            )
    return [CATALOGUE[name]() for name in selected]
