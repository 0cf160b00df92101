"""The methods that CritterBench compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..bases.loading.known import EMBEDDED
from ..bases.loading.registry import architecture_of
from ..core.config import EditConfig, FitMethod, Mode, RunConfig
from ..core.errors import ImagicError
from ..core.settings.reading import read_settings
from ..core.settings.recipes import RECIPES
from ..core.settings.resolve import resolve
from ..core.text import exact
from ..methods.catalogue import GUIDANCE, SAMPLING, default_config
from ..methods.flows.flowedit import FlowEdit, FlowEditConfig
from ..methods.generated import PromptOnly
from ..methods.imagic import Imagic
from ..methods.method import Method
from ..methods.sampled import SamplingMethod
from ..methods.sdedit import SDEdit, SDEditConfig
from ..methods.subject import SubjectMethod
from .bounds import Bounds
from .runner import Benched

RECIPE_FILES = Path(__file__).parent
STRENGTHS = (0.5, 0.65, 0.8, 0.9)
FLOWEDIT_SCALES = ((3.0, 1.0), (5.0, 1.5))
"""Guidance scales of FlowEdit towards the target and the source prompt, beside those of its own code."""
SIDE = 64
"""Side of the images of a base that can be measured, in pixels."""
STARTS: dict[str, dict[str, Any]] = {
    "noise": {"edit": {"start": "noise"}},
    "image": {"edit": {"start": "image"}},
    "inverted": {"edit": {"start": "inverted"}},
    "flow": {"edit": {"start": "flow", "ddim_eta": 0.0}},
}
"""Settings of the starts."""
EmbeddedName = Literal["critters", "critters-dit"]
"""An embedded base, whose recipe and methods a base of its kind has."""


def kind_of(base: str) -> EmbeddedName:
    """Returns the embedded base whose recipe and methods a base has: ``critters-dit`` for a flow, ``critters`` for a U-Net.

    Args:
        base: name of a base, or folder in diffusers' format.

    Raises:
        ImagicError: the base is none, or is not for images of 64 x 64 pixels.
    """
    architecture = architecture_of(base)
    if architecture.resolution != SIDE:
        got = f"--base {base}, for images of {architecture.resolution} pixels"
        expected = f"{' or '.join(EMBEDDED)}, or another of {SIDE} pixels"
        raise ImagicError(got, expected, "choose another base: the pictures of CritterBench are as small")
    return "critters-dit" if architecture.process == "flow" else "critters"


def defaults(mode: Mode, changes: Mapping[str, Any] | None = None, base: EmbeddedName = "critters") -> RunConfig:
    """Returns the settings of a run on an embedded base: the recipe of a mode with some changes.

    Args:
        mode: lora, full or embedding.
        changes: settings that override the recipe, as nested mappings.
        base: the embedded base.
    """
    return resolve({"base": base, "tune": {"mode": mode}}, changes or {}, RECIPES[base])


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


def other_starts(mode: Mode, base: EmbeddedName) -> dict[str, tuple[float, EditConfig]]:
    """Returns eta and settings for edits that start from elsewhere than the default of the base: from noise, from the noised photo, ...

    Edit-friendly inversion, the default of ``critters``, reproduces the photo by itself. These starts show what the fit alone keeps.
    """
    usual = defaults(mode, base=base).edit.start
    starts = [start for start in STARTS if start != usual and (base == "critters-dit" or start != "flow")]
    configs = {start: defaults(mode, STARTS[start], base) for start in starts}
    return {start: (config.eta, config.edit) for start, config in configs.items()}


def imagic(name: str, mode: Mode, starts: bool, base: EmbeddedName) -> Imagic:
    """Returns Imagic with the recipe of a base.

    Args:
        name: name of the method.
        mode: lora, full or embedding.
        starts: whether it has rows for :func:`other_starts`.
        base: the embedded base.
    """
    return Imagic(name, defaults(mode, base=base), other_starts(mode, base) if starts else None)


def sampling(name: str, base: EmbeddedName) -> SamplingMethod[Any]:
    """Returns a method without a fit with its own defaults, at the guidance scale of the embedded bases.

    The row of a method that needs a mask ends in ``-given``: it gets the mask of :func:`~imagic_lora.bench.cases.given_mask`.

    Args:
        name: name of the method.
        base: the embedded base.
    """
    method = SAMPLING[name]
    row = f"{name}-given" if "mask" in method.requires else name
    return method({row: default_config(method, embedded=True)})


def prompt_only(base: EmbeddedName) -> PromptOnly:
    """Returns the method that samples from noise, with as many steps as the edits of Imagic."""
    return PromptOnly({"prompt-only": PromptOnly.config_class(steps=defaults("lora", base=base).edit.steps, guidance_scale=GUIDANCE)})


def sdedit(base: EmbeddedName) -> SDEdit:
    """Returns SDEdit with a row for each of :data:`STRENGTHS`, with as many steps as the edits of Imagic."""
    steps = defaults("lora", base=base).edit.steps
    return SDEdit(
        {f"sdedit-{exact(strength)}": SDEditConfig(steps=steps, guidance_scale=GUIDANCE, strength=strength) for strength in STRENGTHS}
    )


def flowedit(base: EmbeddedName) -> FlowEdit:
    """Returns FlowEdit with the scales of its own code, which are for Stable Diffusion 3, and a row for each of :data:`FLOWEDIT_SCALES`."""
    rows = {f"flowedit-{exact(to)}": FlowEditConfig(guidance_scale=to, source_guidance_scale=away) for to, away in FLOWEDIT_SCALES}
    return FlowEdit({"flowedit": FlowEditConfig(), **rows})


def reference(file: str, name: str, base: EmbeddedName) -> Imagic:
    """Returns Imagic with a recipe from the YAML files in this folder, on an embedded base at its own resolution.

    Args:
        file: name of the YAML file.
        name: name of the method.
        base: the embedded base.
    """
    return Imagic(name, resolve({"base": base, "resolution": None}, read_settings(RECIPE_FILES / file), {}))


def subject(method: FitMethod, base: EmbeddedName) -> SubjectMethod:
    """Returns DreamBooth, as LoRA, or textual inversion with the recipe of the embedded base."""
    return SubjectMethod(resolve({"base": base, "method": method}, {}, RECIPES[base]))


CATALOGUE: dict[str, Callable[[EmbeddedName], Benched]] = {
    "bounds": lambda base: Bounds(),
    "prompt-only": prompt_only,
    "sdedit": sdedit,
    "imagic-lora": partial(imagic, "imagic-lora", "lora", True),
    "imagic-full": partial(imagic, "imagic-full", "full", False),
    "embedding-only": partial(imagic, "embedding-only", "embedding", True),
    "reference": partial(reference, "reference-imagic.yaml", "reference"),
    "reference-retuned": partial(reference, "reference-imagic-retuned.yaml", "reference-retuned"),
    **{name: partial(sampling, name) for name in SAMPLING if name not in ("prompt-only", "sdedit", "inpaint")},
    "flowedit": flowedit,
    "dreambooth": partial(subject, "dreambooth"),
    "textual-inversion": partial(subject, "textual-inversion"),
}
"""The methods by name: each is built for an embedded base."""
_DENOISERS: dict[EmbeddedName, str] = {"critters": "unet", "critters-dit": "transformer"}


def names_for(base: EmbeddedName) -> list[str]:
    """Returns the names of the methods that work on an embedded base."""
    classes: dict[str, type[Method]] = {**SAMPLING, "dreambooth": SubjectMethod, "textual-inversion": SubjectMethod}
    return [name for name in CATALOGUE if name not in classes or _DENOISERS[base] in classes[name].supports]


def chosen(names: str | None, base: EmbeddedName = "critters") -> list[Benched]:
    """Returns the methods of a list, in its order and without duplicates.

    Args:
        names: names of methods, separated by commas; None is all that work on the base.
        base: the embedded base that has the recipe and the methods.

    Raises:
        ImagicError: a name is not in the catalogue, or its method does not work on the base.
    """
    known = names_for(base)
    selected = known if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in selected:
        if name not in known:
            why = f": {name} does not work on a {_DENOISERS[base]}" if name in CATALOGUE else ""
            expected = f"one or more of {', '.join(known)}, separated by commas"
            raise ImagicError(f"--methods {names}{why}", expected, "correct the list of methods")
    return [CATALOGUE[name](base) for name in selected]
