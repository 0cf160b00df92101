"""Merges the settings of a run: built-in < recipe of the base < preset < file < flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..bases.architecture import Architecture
from ..bases.loading.configs import recipe_for
from ..bases.loading.registry import architecture_of
from ..core.config import RunConfig
from ..core.settings.merging import merged
from ..core.settings.reading import validated
from ..memory.plan import Assumed, Plan
from ..memory.presets import choose_preset


class Configured(NamedTuple):
    """The settings of a run and what they were derived from.

    Args:
        run: the complete settings, with the preset filled in.
        why: the reason for the choice of the preset, for the user.
        architecture: the architecture of the base.
    """

    run: RunConfig
    why: str
    architecture: Architecture


def configure_run(flags: Mapping[str, Any], file: Mapping[str, Any], processes: tuple[int, int] = (1, 0)) -> Configured:
    """Returns the settings of a run on this machine.

    Args:
        flags: explicitly given flags, as nested mappings.
        file: explicitly given settings of the configuration file, as nested mappings.
        processes: the number of processes, and the index of the card that this process uses.

    Raises:
        ImagicError: a setting is unknown, two settings conflict, the base does not exist, or no preset fits the memory.
    """
    given = validated(merged(file, flags))
    architecture = architecture_of(given.base, given.revision)
    architecture.check_trainable(given.base)
    recipe = recipe_for(architecture, given.base, given.revision)
    chosen = choose_preset(
        lambda: architecture, flags, file, recipe, processes=processes, large=architecture.has_large_encoder, rehearse=_rehearse
    )
    return Configured(*chosen, architecture)


def _rehearse(architecture: Architecture, run: RunConfig, assumed: Assumed) -> Plan:
    """As :func:`~imagic_lora.training.rehearsing.rehearsal.rehearse`; this module does not import torch."""
    from .rehearsing.rehearsal import rehearse

    return rehearse(architecture, run, assumed)


def configure(settings: Mapping[str, Any]) -> RunConfig:
    """Returns the settings of a run on this machine, for library users: ``configure({"base": "sd15", "tune": {"mode": "full"}})``.

    Args:
        settings: the settings that differ from the defaults, as nested mappings.

    Returns:
        The complete settings: built-in defaults < recipe of the base < preset < ``settings``.

    Raises:
        ImagicError: a setting is unknown, two settings conflict, the base does not exist, or no preset fits the memory.
    """
    return configure_run(settings, {}).run
