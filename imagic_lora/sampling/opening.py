"""Opens a stored adapter for edits: its settings on this machine, its base, and an Editor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.loading import registry
from ..core.config import RunConfig
from ..core.errors import ImagicWarning
from ..core.runtime import resolve_runtime
from ..memory.presets import choose_preset_for_edit
from .editor import Editor


def edit_settings(adapter: Adapter, given: Mapping[str, Any], base: str | None = None) -> RunConfig:
    """Returns the settings of an edit: those of the adapter, with the memory levers of this machine.

    Args:
        adapter: the stored adapter.
        given: explicit settings of the groups ``edit`` and ``memory``, and ``preset``.
        base: a base that replaces the one in the adapter's record.

    Raises:
        ImagicError: as :func:`~imagic_lora.memory.presets.choose_preset_for_edit`.
    """
    return choose_preset_for_edit(lambda: registry.architecture_of(*_source(adapter, base)), adapter.record.config, given)


def open_editor(adapter: Adapter, run: RunConfig, base: str | None = None, force: bool = False) -> Editor:
    """Loads the base of an adapter.

    Args:
        adapter: the stored adapter; its weights are loaded by the first edit.
        run: settings from :func:`edit_settings`.
        base: as there.
        force: whether a base with other weights of the same shapes is allowed; a warning names both bases.

    Raises:
        ImagicError: as :func:`~imagic_lora.bases.loading.registry.load_base`.
    """
    name, revision = _source(adapter, base)
    editor = Editor(registry.load_base(name, resolve_runtime(run.memory), revision), force)
    made_for = adapter.record.base
    if force and editor.base.fingerprint != made_for.fingerprint:
        message = f"adapter {adapter.name} was made for base {made_for.name} and is applied to base {editor.base.name}"
        warnings.warn(message, ImagicWarning, stacklevel=2)
    return editor


def _source(adapter: Adapter, base: str | None) -> tuple[str, str | None]:
    """The name and the revision of the base to load."""
    return (base, None) if base else (adapter.record.base.name, adapter.record.base.revision)
