"""Recipes of bases, presets of cards, and the merging of settings: built-in < recipe < preset < file < flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ValidationError

from .config import FitMethod, Mode, Preset, RunConfig, TuneConfig
from .errors import ImagicError
from .unread import flag_of, paths, unread
from .validation import first_problem
from .yaml_files import read_yaml

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


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings. Later layers override earlier ones key by key; the layers are not modified."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            lower = result.get(name)
            result[name] = merged(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return result


def differences(was: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> list[str]:
    """Returns one phrase for each value that differs between ``was`` and ``now`` or exists in only one of them.

    Args:
        was: nested mapping of the old values.
        now: nested mapping of the new values.
        group: prefix of the names, used for nested mappings.
    """
    phrases: list[str] = []
    for name in {**was, **now}:
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            phrases += differences(old, new, f"{group}{name}.")
        elif old != new or (name in was) != (name in now):
            before, after = (repr(values[name]) if name in values else "missing" for values in (was, now))
            phrases.append(f"{group}{name} was {before}, is {after}")
    return phrases


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
    """The mode that nested settings select: the default where they name none, or one that does not exist."""
    tune = given.get("tune")
    named = tune.get("mode") if isinstance(tune, Mapping) else None
    if method_of(given) == "textual-inversion":
        return "embedding"  # no weight of the denoiser is trained
    return cast(Mode, named) if named in get_args(Mode) else TuneConfig().mode


def method_of(given: Mapping[str, Any]) -> FitMethod:
    """The method that nested settings select: the default where they name none, or one that does not exist."""
    named = given.get("method")
    return cast(FitMethod, named) if named in get_args(FitMethod) else "imagic"


def recipe_part(method: FitMethod, mode: Mode) -> RecipePart:
    """The part of a recipe for a run."""
    if method == "imagic":
        return mode
    return "textual-inversion" if method == "textual-inversion" else "dreambooth-full" if mode == "full" else "dreambooth-lora"


def _fixed(method: FitMethod) -> dict[str, Any]:
    """Settings that follow from the method: a new word trains no weight."""
    return {"tune": {"mode": "embedding"}} if method == "textual-inversion" else {}


def resolve(
    flags: Mapping[str, Any], file: Mapping[str, Any], recipe: Recipe, preset: Preset | None = None, large: bool = False
) -> RunConfig:
    """Merges the settings of a run: built-in < recipe < preset < file < flags.

    Args:
        flags, file: the explicitly given settings, as nested mappings.
        recipe: one of :data:`RECIPES`; the mode that file and flags select picks its part.
        preset: overrides the preset of file and flags, such as the one chosen for ``auto``. Without it their preset applies, and ``auto``
            changes nothing.
        large: whether the base has a text encoder of billions of parameters, for which presets have more levers.

    Raises:
        ImagicError: an unknown name, a value out of range, or two settings that exclude each other.
    """
    given = merged(file, flags)
    method, mode = method_of(given), mode_of(given)
    preset_name = preset or given.get("preset", "auto")
    levers = preset_levers(preset_name, mode, large)
    override = {"preset": preset} if preset else {}
    run = validated(merged(recipe.get(recipe_part(method, mode), {}), levers, given, override, _fixed(method)))
    for flag, other, expected in (*unread(run, given), *_clashes(run, given)):
        source = "the flags" if flag in _named(flags) else "the file" if flag in _named(file) else f"preset {preset_name}"
        raise ImagicError(f"{flag} (from {source}) together with {other}", expected, f"change {other} or leave out {flag}")
    return run


def _clashes(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields settings that would have no effect: the flag, the flag that excludes it, and the valid combination."""
    memory, mode, named = run.memory, f"--mode {run.tune.mode}", _flags(given)
    for flag in named:
        if run.tune.mode == "embedding" and flag in _STAGE_2:
            yield flag, mode, "settings of stage 2 only with --mode lora or --mode full: mode embedding has no stage 2"
        if run.tune.mode == "full" and flag in ("--rank", "--alpha", "--targets"):
            yield flag, mode, "LoRA settings only with --mode lora"
    if run.tune.mode == "full" and memory.quantize != "none":
        yield "--quantize", mode, "a quantized denoiser only with --mode lora or --mode embedding: its weights cannot be trained"
    if run.tune.mode == "embedding" and memory.optimizer == "adafactor":
        yield "--optimizer", mode, "adafactor only with --mode lora or --mode full: mode embedding has no stage 2"
    if run.tune.mode != "full" and memory.master_weights != "fp32":
        yield "--master-weights", mode, "master weights only with --mode full: the other modes freeze the weights of the base"
    if run.tune.mode != "full" and memory.autocast_cache:
        yield "--autocast-cache", mode, "the autocast cache only with --mode full"
    if memory.master_weights != "fp32" and memory.autocast_cache:
        yield "--autocast-cache", "--master-weights bf16-stochastic", "the autocast cache only with fp32 master weights"
    if memory.master_weights != "fp32" and memory.dtype in ("fp16", "fp32"):
        yield "--master-weights", f"--dtype {memory.dtype}", "bf16 master weights only with bf16 arithmetic"
    for flag, starts in (("--strength", ("image", "flow")), ("--source-eta", ("inverted", "flow"))):
        if flag in named and run.edit.start not in starts:
            yield flag, f"--start {run.edit.start}", f"this setting only with --start {' or '.join(starts)}"
    if "--ddim-eta" in named and run.edit.ddim_eta and run.edit.start == "flow":
        yield "--ddim-eta", "--start flow", "noise after steps only with another --start: start flow adds its own at every level"
    for flag, value in (("--negative-prompt", run.edit.negative_prompt), ("--guidance-rescale", run.edit.guidance_rescale)):
        if flag in named and value and run.edit.guidance_scale <= 1:
            yield flag, f"--guidance-scale {run.edit.guidance_scale:g}", "this setting only with guidance: a guidance scale above 1"
    space = f"--embed.space {run.embed.space}"
    if "--padding-eta" in named and run.embed.space != "input":
        yield "--padding-eta", space, "this setting only with --embed.space input"
    if run.embed.space == "input" and run.embed.tokens != "all":
        yield "--embed.tokens", space, "only --embed.tokens all with --embed.space input: words and padding are trained"
    if run.embed.space == "input" and run.embed.relative:
        yield "--embed.relative", space, "relative rates only with --embed.space output"
    yield from _monitoring_clashes(run, named)


def _monitoring_clashes(run: RunConfig, named: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """As :func:`_clashes`, for the settings of the group monitoring."""
    monitoring, mode = run.monitoring, f"--mode {run.tune.mode}"
    early_stop = f"--early-stop {monitoring.early_stop}"
    if monitoring.early_stop != "off" and not monitoring.convergence_every:
        yield "--early-stop", "--convergence-every 0", "early stopping only with evaluations of the relative loss"
    if run.tune.mode == "embedding" and monitoring.early_stop == "tune":
        yield "--early-stop", mode, "early stopping of a stage that runs: mode embedding has no stage 2"
    if run.tune.mode == "embedding" and monitoring.preview_every:
        yield "--preview-every", mode, "previews only with --mode lora or --mode full: they belong to stage 2"
    for flag in ("--patience", "--min-improvement"):
        if flag in named and monitoring.early_stop == "off":
            yield flag, early_stop, "this setting only with --early-stop embed, tune or both"


_STAGE_2 = tuple(flag_of(TuneConfig, "tune", name) for name in TuneConfig.model_fields if name != "mode")


def _flags(given: Mapping[str, Any]) -> list[str]:
    """The flags of the settings given in these groups; those of edit as the command ``edit`` has them."""
    groups = {group: given[group] for group in ("tune", "memory", "edit", "monitoring") if isinstance(given.get(group), Mapping)}
    return [
        flag_of(TuneConfig, group, name) if group == "tune" else f"--{name.replace('_', '-')}"
        for group, names in groups.items()
        for name in names
    ]


def _named(given: Mapping[str, Any]) -> set[str]:
    """Every flag that the given settings are known by."""
    return {*_flags(given), *(flag for _, flag in paths(given))}


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
