"""The settings of a run from all sources: built-in < recipe < preset < file < flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from ..config import FitMethod, Mode, Preset, RunConfig, TuneConfig
from ..errors import ImagicError
from .clashes import clashes, named_flags
from .merging import merged
from .presets import preset_levers
from .reading import validated
from .recipes import Recipe, recipe_part
from .unread import unread


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
    for flag, other, expected in (*unread(run, given), *clashes(run, given)):
        source = "the flags" if flag in named_flags(flags) else "the file" if flag in named_flags(file) else f"preset {preset_name}"
        raise ImagicError(f"{flag} (from {source}) together with {other}", expected, f"change {other} or leave out {flag}")
    return run
