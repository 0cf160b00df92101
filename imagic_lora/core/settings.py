"""Recipes of bases, presets of cards, and the merging of settings: built-in < recipe < preset < file < flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .config import Mode, Preset, RunConfig
from .errors import ImagicError
from .validation import first_problem
from .yaml_files import read_yaml

Recipe = Mapping[Mode, Mapping[str, Any]]

_CRITTERS: dict[str, Any] = {  # docs/log.md lists the alternatives that were tried
    "eta": 0.7,
    "embed": {"steps": 60, "learning_rate": 5e-2},
    "edit": {"guidance_scale": 1.5, "steps": 23, "start": "inverted", "ddim_eta": 1.0, "source_eta": 0.35},
}

RECIPES: dict[str, dict[Mode, dict[str, Any]]] = {
    "sd": {
        "lora": {},
        "full": {"embed": {"steps": 1000, "learning_rate": 2e-3}, "tune": {"steps": 1500, "learning_rate": 5e-7}},
    },
    "critters": {
        "lora": {
            **_CRITTERS,
            "tune": {"steps": 60, "learning_rate": 1e-3, "rank": 4, "targets": "attention+conv"},
        },
        "full": {**_CRITTERS, "tune": {"steps": 60, "learning_rate": 4e-5}},
    },
}
"""Learning rates, steps and sampling settings for a kind of base, by mode."""

_EMBEDDED_GUIDANCE = 8.0  # the value in the paper of latent consistency models (arXiv 2310.04378)

_SOME_LEVERS = {"idle": "release", "vae_slicing": True}

_MORE_LEVERS = {**_SOME_LEVERS, "gradient_checkpointing": True}

_MOST_LEVERS = {**_MORE_LEVERS, "optimizer_in_backward": True}

PRESETS: dict[Preset, dict[Mode, dict[str, Any]]] = {
    "24gb": {"lora": {"edit": {"batch_size": 4}}, "full": {"edit": {"batch_size": 4}}},
    "16gb": {"lora": {"memory": _SOME_LEVERS, "edit": {"batch_size": 4}}, "full": {"memory": _MORE_LEVERS, "edit": {"batch_size": 4}}},
    "12gb": {"lora": {"memory": _MORE_LEVERS, "edit": {"batch_size": 2}}, "full": {"memory": _MOST_LEVERS, "edit": {"batch_size": 2}}},
    "8gb": {
        "lora": {"memory": {**_MORE_LEVERS, "vae_tiling": True}, "edit": {"batch_size": 1}},
        "full": {"memory": {**_MOST_LEVERS, "vae_tiling": True}, "edit": {"batch_size": 1}},
    },
    "cpu": {"lora": {"memory": {"device": "cpu"}}, "full": {"memory": {"device": "cpu"}}},
}
"""Memory levers for a size of card, by mode; the fastest preset comes first."""


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings. Later layers override earlier ones key by key; the layers are not modified."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            lower = result.get(name)
            result[name] = merged(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return result


def recipe_of(base: str, few_steps: int | None = None, embeds_guidance: bool = False) -> Recipe:
    """Returns the recipe of a base: its own, or that of Stable Diffusion.

    Args:
        base: name of the base.
        few_steps: number of sampling steps of a distilled base, or None. A distilled base samples without classifier-free guidance.
        embeds_guidance: whether the guidance scale is an input of the denoiser.
    """
    recipe = RECIPES.get(base, RECIPES["sd"])
    if few_steps is None:
        return recipe
    sampling = {"edit": {"steps": few_steps, "guidance_scale": _EMBEDDED_GUIDANCE if embeds_guidance else 0.0}}
    return {mode: merged(settings, sampling) for mode, settings in recipe.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """Reads and validates the settings of a YAML file, as nested mappings. An empty file has none.

    Raises:
        ImagicError: as :func:`~imagic_lora.core.yaml_files.read_yaml`; an unknown name or a value out of range.
    """
    settings = read_yaml(path)
    try:
        RunConfig.model_validate(settings)
    except ValidationError as error:
        found = settings_error(error)
        raise ImagicError(f"{path}: {found.got}", found.expected, found.remedy) from error
    return settings


def mode_of(given: Mapping[str, Any]) -> Mode:
    """The mode that nested settings select."""
    tune = given.get("tune")
    return "full" if isinstance(tune, Mapping) and tune.get("mode") == "full" else "lora"


def resolve(flags: Mapping[str, Any], file: Mapping[str, Any], recipe: Recipe, preset: Preset | None = None) -> RunConfig:
    """Merges the settings of a run: built-in < recipe < preset < file < flags.

    Args:
        flags, file: the explicitly given settings, as nested mappings.
        recipe: one of :data:`RECIPES`; the mode that file and flags select picks its part.
        preset: overrides the preset of file and flags, such as the one chosen for ``auto``. Without it their preset applies, and ``auto``
            changes nothing.

    Raises:
        ImagicError: an unknown name, a value out of range, or two settings that exclude each other.
    """
    given = merged(file, flags)
    mode = mode_of(given)
    preset_name = preset or given.get("preset", "auto")
    levers = PRESETS[preset_name][mode] if preset_name in PRESETS else {}
    override = {"preset": preset} if preset else {}
    run = validated(merged(recipe.get(mode, {}), levers, given, override))
    for name, other, expected in _clashes(run, given):
        source = "the flags" if name in _named(flags) else "the file"
        flag = "--" + name.replace("_", "-")
        raise ImagicError(f"{flag} (from {source}) together with {other}", expected, f"change {other} or leave out {flag}")
    return run


def _clashes(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields settings that would have no effect: the name, the flag that excludes it, and the valid combination."""
    memory, full = run.memory, run.tune.mode == "full"
    mode = f"--mode {run.tune.mode}"
    for name in ("rank", "alpha", "targets"):
        if full and name in _named(given):
            yield name, mode, "LoRA settings only with --mode lora"
    if full and memory.quantize == "nf4":
        yield "quantize", mode, "a quantized denoiser only with --mode lora: 4-bit weights cannot be trained"
    if not full and memory.master_weights != "fp32":
        yield "master_weights", mode, "master weights only with --mode full: LoRA layers are always fp32"
    if not full and memory.autocast_cache:
        yield "autocast_cache", mode, "the autocast cache only with --mode full"
    if memory.master_weights != "fp32" and memory.autocast_cache:
        yield "autocast_cache", "--master-weights bf16-stochastic", "the autocast cache only with fp32 master weights"
    if memory.master_weights != "fp32" and memory.dtype in ("fp16", "fp32"):
        yield "master_weights", f"--dtype {memory.dtype}", "bf16 master weights only with bf16 arithmetic"
    for name, start in (("strength", "image"), ("source_eta", "inverted")):
        if name in _named(given) and run.edit.start != start:
            yield name, f"--start {run.edit.start}", f"this setting only with --start {start}"


def _named(given: Mapping[str, Any]) -> set[str]:
    """Names of the settings given in the groups tune, memory and edit."""
    groups = [given.get(group) for group in ("tune", "memory", "edit")]
    return {name for group in groups if isinstance(group, Mapping) for name in group}


def validated(values: Mapping[str, Any]) -> RunConfig:
    """Validates nested settings and returns them as a RunConfig.

    Raises:
        ImagicError: an unknown name or a value out of range.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error) from error


def settings_error(error: ValidationError) -> ImagicError:
    """Converts the first error of a pydantic validation into an ImagicError."""
    problem = first_problem(error)
    if problem.kind == "extra_forbidden":
        return ImagicError(f"unknown setting {'.'.join(map(str, problem.place))}", _known(problem.place), "correct its name or remove it")
    return ImagicError(problem.got, problem.expected, "change that setting")


def _known(location: tuple[int | str, ...]) -> str:
    """The names that are valid where pydantic found an unknown one."""
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        annotation = group.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            group = annotation
    return "one of " + ", ".join(group.model_fields)
