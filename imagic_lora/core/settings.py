"""Recipes of bases, presets of cards, and how settings are merged: built-in < recipe < preset < file < flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .config import Mode, Preset, RunConfig
from .errors import ImagicError

Recipe = Mapping[Mode, Mapping[str, Any]]

_CRITTERS: dict[str, Any] = {  # docs/log.md holds what else was tried
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
"""Rates and sizes that suit a kind of base, by mode."""

_EMBEDDED_GUIDANCE = 8.0  # at which latent consistency models are shown by their makers (arXiv 2310.04378)

_ROOMY = {"idle": "release", "vae_slicing": True}

_SPARE = {**_ROOMY, "gradient_checkpointing": True}

_TIGHT = {**_SPARE, "optimizer_in_backward": True}

PRESETS: dict[Preset, dict[Mode, dict[str, Any]]] = {
    "24gb": {"lora": {"edit": {"batch_size": 4}}, "full": {"edit": {"batch_size": 4}}},
    "16gb": {"lora": {"memory": _ROOMY, "edit": {"batch_size": 4}}, "full": {"memory": _SPARE, "edit": {"batch_size": 4}}},
    "12gb": {"lora": {"memory": _SPARE, "edit": {"batch_size": 2}}, "full": {"memory": _TIGHT, "edit": {"batch_size": 2}}},
    "8gb": {
        "lora": {"memory": {**_SPARE, "vae_tiling": True}, "edit": {"batch_size": 1}},
        "full": {"memory": {**_TIGHT, "vae_tiling": True}, "edit": {"batch_size": 1}},
    },
    "cpu": {"lora": {"memory": {"device": "cpu"}}, "full": {"memory": {"device": "cpu"}}},
}
"""Memory levers for a size of card, by mode: the most comfortable first."""


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers laid over each other, later ones on top, group by group."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def recipe_of(base: str, few_steps: int | None = None, embeds_guidance: bool = False) -> Recipe:
    """The recipe that suits a base: its own, or that of Stable Diffusion.

    Args:
        few_steps: of a distilled base, how many steps it samples in; it is not guided by an unconditional pass.
        embeds_guidance: the guidance scale is one of its inputs.
    """
    recipe = RECIPES.get(base, RECIPES["sd"])
    if few_steps is None:
        return recipe
    sampling = {"edit": {"steps": few_steps, "guidance_scale": _EMBEDDED_GUIDANCE if embeds_guidance else 0.0}}
    return {mode: merged(settings, sampling) for mode, settings in recipe.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ImagicError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ImagicError(
            f"{path} cannot be read as YAML: {' '.join(str(error).split())}", "a text file of settings", "see configs/ for examples"
        ) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ImagicError(f"{path} holds a {type(found).__name__}", "a mapping of settings", "see configs/ for examples")
    return found


def mode_of(given: Mapping[str, Any]) -> Mode:
    """The mode that settings ask for."""
    tune = given.get("tune")
    return "full" if isinstance(tune, Mapping) and tune.get("mode") == "full" else "lora"


def resolve(flags: Mapping[str, Any], file: Mapping[str, Any], recipe: Recipe, preset: Preset | None = None) -> RunConfig:
    """The settings of a run: built-in < recipe < preset < file < flags.

    Args:
        flags, file: only what was given explicitly, as nested mappings.
        recipe: one of :data:`RECIPES`; the mode that file and flags ask for chooses its half.
        preset: what ``auto`` came to; where not given, the one that file or flags name, and none for ``auto``.

    Raises:
        ImagicError: an unknown name, a value out of range, or two settings that clash.
    """
    given = merged(file, flags)
    mode = mode_of(given)
    chosen = preset or given.get("preset", "auto")
    levers = PRESETS[chosen][mode] if chosen in PRESETS else {}
    asked = {"preset": preset} if preset else {}
    run = validated(merged(recipe.get(mode, {}), levers, given, asked))
    for name, other, right in _clashes(run, given):
        source = "the flags" if name in _named(flags) else "the file"
        flag = "--" + name.replace("_", "-")
        raise ImagicError(f"{flag} (from {source}) together with {other}", right, f"change {other} or leave out {flag}")
    return run


def _clashes(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Settings that would be read and ignored: their name, the flag that rules them out, and what is right."""
    memory, full = run.memory, run.tune.mode == "full"
    mode = f"--mode {run.tune.mode}"
    for name in ("rank", "alpha", "targets"):
        if full and name in _named(given):
            yield name, mode, "LoRA settings with --mode lora only"
    if full and memory.quantize == "nf4":
        yield "quantize", mode, "a quantised denoiser with --mode lora only: 4-bit weights cannot be trained"
    if not full and memory.master_weights != "fp32":
        yield "master_weights", mode, "master weights with --mode full only: LoRA layers are always fp32"
    if not full and memory.autocast_cache:
        yield "autocast_cache", mode, "a cache of cast weights with --mode full only"
    if memory.master_weights != "fp32" and memory.autocast_cache:
        yield "autocast_cache", "--master-weights bf16-stochastic", "a cache of cast weights with fp32 master weights only"
    if memory.master_weights != "fp32" and memory.dtype in ("fp16", "fp32"):
        yield "master_weights", f"--dtype {memory.dtype}", "bf16 weights with bf16 arithmetic"
    for name, start in (("strength", "image"), ("source_eta", "inverted")):
        if name in _named(given) and run.edit.start != start:
            yield name, f"--start {run.edit.start}", f"--start {start} with it"


def _named(given: Mapping[str, Any]) -> set[str]:
    """Names of what is given for the tuning, the memory and the sampling."""
    groups = [given.get(group) for group in ("tune", "memory", "edit")]
    return {name for group in groups if isinstance(group, Mapping) for name in group}


def validated(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig of these values.

    Raises:
        ImagicError: as :func:`resolve`.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error) from error


def settings_error(error: ValidationError) -> ImagicError:
    """What is wrong with the first of the values that pydantic refused."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ImagicError(f"unknown setting {where}", _known(first["loc"]), "mend its name or remove it")
    return ImagicError(
        f"{where} = {first['input']!r}", first["msg"].removeprefix("Input should be ").removeprefix("Value error, "), "change that setting"
    )


def _known(location: tuple[int | str, ...]) -> str:
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        kind = group.model_fields[str(part)].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            group = kind
    return "one of " + ", ".join(group.model_fields)
