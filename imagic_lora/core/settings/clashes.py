"""Settings that exclude each other, or that the mode of a run does not read; giving one is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import RunConfig, TuneConfig
from .unread import flag_of, paths

_STAGE_2 = tuple(flag_of(TuneConfig, "tune", name) for name in TuneConfig.model_fields if name != "mode")


def clashes(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
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
    """As :func:`clashes`, for the settings of the group monitoring."""
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


def _flags(given: Mapping[str, Any]) -> list[str]:
    """The flags of the settings given in these groups; those of edit as the command ``edit`` has them."""
    groups = {group: given[group] for group in ("tune", "memory", "edit", "monitoring") if isinstance(given.get(group), Mapping)}
    return [
        flag_of(TuneConfig, group, name) if group == "tune" else f"--{name.replace('_', '-')}"
        for group, names in groups.items()
        for name in names
    ]


def named_flags(given: Mapping[str, Any]) -> set[str]:
    """Every flag that the given settings are known by."""
    return {*_flags(given), *(flag for _, flag in paths(given))}
