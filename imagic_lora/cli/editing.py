"""What the commands that sample from a stored adapter have in common: their settings, and an Editor with the base."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.config import DeviceConfig, EditConfig, PresetOrAuto, RunConfig
from ..core.errors import ImagicWarning
from .libraries import import_libraries

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..sampling.editor import Editor


@dataclass(frozen=True)
class Source:
    """The base that an adapter is applied to: name, folder, file or hub id, and revision of a hub id."""

    name: str
    revision: str | None


def resolved(
    adapter: Adapter, base: str | None, settings: EditConfig | None, device: DeviceConfig | None, preset: PresetOrAuto
) -> tuple[RunConfig, Source]:
    """Returns the settings of an edit, and its base. Imports torch and diffusers.

    Args:
        adapter: gives the settings that no flag gives.
        base: the base of the flags; None for that of the adapter.
        settings, device: the flags that were given.
        preset: memory levers for a card of this size.
    """
    record = adapter.record
    import_libraries(bitsandbytes=record.config.memory.quantize != "none")
    from ..bases.loading.registry import architecture_of
    from ..memory.presets import choose_preset_for_edit

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    source = Source(base, None) if base else Source(record.base.name, record.base.revision)
    given = {"edit": flags, "memory": levers, "preset": preset}
    return choose_preset_for_edit(lambda: architecture_of(source.name, source.revision), record.config, given), source


def open_editor(adapter: Adapter, source: Source, run: RunConfig, force: bool) -> Editor:
    """Loads the base. Warns if it has other weights than the base that the adapter was made for.

    Args:
        adapter: the stored adapter.
        source: the base.
        run: settings of the edit.
        force: whether other weights of the same shapes are allowed.
    """
    from ..bases.loading.registry import load_base
    from ..core.runtime import resolve_runtime
    from ..sampling.editor import Editor

    editor, record = Editor(load_base(source.name, resolve_runtime(run.memory), source.revision), force), adapter.record
    if force and editor.base.fingerprint != record.base.fingerprint:
        message = f"adapter {adapter.name} was made for base {record.base.name} and is applied to base {editor.base.name}"
        warnings.warn(message, ImagicWarning, stacklevel=1)
    return editor
