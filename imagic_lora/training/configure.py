"""The settings of a run from what was given: built-in < recipe of the base < preset < file < flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..bases.architecture import Architecture
from ..bases.loading.registry import architecture_of
from ..core.config import RunConfig
from ..core.settings import merged, recipe_of, validated
from ..memory.presets import choose_preset


class Configured(NamedTuple):
    """Settings, why they have their preset, and what the base is made of."""

    run: RunConfig
    why: str
    architecture: Architecture


def configure_run(flags: Mapping[str, Any], file: Mapping[str, Any], processes: tuple[int, int] = (1, 0)) -> Configured:
    """The settings of a run on this machine.

    Args:
        flags, file: only what was given explicitly, as nested mappings.
        processes: how many there are, and the index of this one's card.

    Raises:
        ImagicError: an unknown setting, two that clash, no such base, or no preset that fits.
    """
    given = validated(merged(file, flags))
    built = architecture_of(given.base, given.revision)
    recipe = recipe_of(given.base, built.few_steps, built.embeds_guidance)
    return Configured(*choose_preset(lambda: built, flags, file, recipe, processes=processes), built)


def configure(settings: Mapping[str, Any]) -> RunConfig:
    """The settings of a run on this machine, for library users: ``configure({"base": "sd15", "tune": {"mode": "full"}})``.

    Raises:
        ImagicError: as :func:`configure_run`.
    """
    return configure_run(settings, {}).run
