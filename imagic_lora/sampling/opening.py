"""Opens a stored adapter for edits: its settings on this machine, its base, and an Editor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.loading import registry
from ..bases.loading.configs import recipe_for
from ..bases.loading.known import bases_file, known_base, named_bases
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.errors import ImagicError, ImagicWarning
from ..core.runtime import resolve_runtime
from ..memory.presets import choose_preset_for_edit
from .editor import Editor
from .kept import opened, stamp
from .metadata import ImageMetadata
from .mixing import mixtures

_OF_THE_TWIN = ("steps", "guidance_scale")


def twin_of(adapter: Adapter) -> str:
    """Name of the distilled twin of an adapter's base, which samples in few steps with the same adapter.

    Raises:
        ImagicError: no list of bases names one.
    """
    made_for = adapter.record.base
    entry = known_base(made_for.name, made_for.revision).entry
    if entry is None or entry.twin is None:
        twins = ", ".join(sorted(name for name, known in named_bases().items() if known.twin))
        got = f"--twin with adapter {adapter.name}, and no twin of its base {made_for.name} is known"
        raise ImagicError(got, f"an adapter of one of {twins}", f"leave out --twin, or name the twin in {bases_file()}")
    return entry.twin


def made_by_twin(adapter: Adapter, metadata: ImageMetadata) -> bool:
    """Whether an image was made with the twin of its adapter's base."""
    made_for = adapter.record.base
    entry = known_base(made_for.name, made_for.revision).entry
    return metadata.forced is not None and entry is not None and entry.twin == metadata.base


def edit_settings(adapter: Adapter, given: Mapping[str, Any], base: str | None = None, twin: bool = False) -> RunConfig:
    """Returns the settings of an edit: those of the adapter, with the memory levers of this machine.

    Args:
        adapter: the stored adapter.
        given: explicit settings of the groups ``edit`` and ``memory``, and ``preset``.
        base: a base that replaces the one in the adapter's record.
        twin: whether that base is the twin, whose steps and guidance scale replace those of the adapter.

    Raises:
        ImagicError: as :func:`~imagic_lora.memory.presets.choose_preset_for_edit`.
    """
    architecture, stored = cache(lambda: registry.architecture_of(*source_of(adapter, base))), adapter.record.config
    if twin:
        found = architecture()
        own = recipe_for(found, base or "")["lora"].get("edit", {})
        stored = stored.model_copy(
            update={"edit": stored.edit.model_copy(update={name: own[name] for name in _OF_THE_TWIN if name in own})}
        )
    return choose_preset_for_edit(architecture, stored, given)


def open_editor(adapter: Adapter, run: RunConfig, base: str | None = None, force: bool = False, twin: bool = False) -> Editor:
    """Loads the base of an adapter, or takes the one that this process has kept (:mod:`~imagic_lora.sampling.kept`).

    Args:
        adapter: the stored adapter; its weights are loaded by the first edit.
        run: settings from :func:`edit_settings`.
        base: as there.
        force: whether a base with other weights of the same shapes is allowed; a warning names both bases.
        twin: whether the base is the twin of the adapter's, whose weights are others of the same shapes.

    Raises:
        ImagicError: as :func:`~imagic_lora.bases.loading.registry.load_base`.
    """
    (name, revision), forced = source_of(adapter, base), force or twin
    runtime = resolve_runtime(run.memory)
    editor = opened(
        lambda: (name, revision, runtime, forced, stamp(registry.locate(name, revision))),
        lambda: Editor(registry.load_base(name, runtime, revision), forced),
    )
    made_for = adapter.record.base
    if force and not twin and editor.base.fingerprint != made_for.fingerprint:
        message = f"adapter {adapter.name} was made for base {made_for.name} and is applied to base {editor.base.name}"
        warnings.warn(message, ImagicWarning, stacklevel=2)
    return editor


def encoded(adapter: Adapter, etas: Sequence[float]) -> list[Conditioning]:
    """Returns the conditioning of each eta of a plain edit, on the CPU. Loads the base, whose text encoders encode vectors of tokens.

    Args:
        adapter: the stored adapter.
        etas: each in [0, 2].

    Raises:
        ImagicError: as :func:`edit_settings`, :func:`open_editor` and :meth:`~imagic_lora.sampling.editor.Editor.conditionings`.
    """
    record, run = adapter.record, edit_settings(adapter, {})
    editor = open_editor(adapter, run)
    stored = editor.conditionings(adapter)
    found, _ = mixtures(editor.base, record.prompt, stored["target"], stored["optimised"], etas, record.config.edit)
    return [one.to("cpu") for one in found]


def source_of(adapter: Adapter, base: str | None) -> tuple[str, str | None]:
    """The name and the revision of the base to load: those in the record of an adapter, unless another base replaces it."""
    return (base, None) if base is not None else (adapter.record.base.name, adapter.record.base.revision)
