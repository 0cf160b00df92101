"""What came of a photo, and whether the adapter that a line of a list asks for is stored."""

from __future__ import annotations

import hashlib
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.store import Store
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.settings.merging import differences
from .table import Entry

_LEVERS = {"device", "idle", "vae_tiling", "vae_slicing", "gradient_checkpointing", "optimizer_in_backward", "autocast_cache"}
_NO_RESULT: dict[str, Any] = {"preset": True, "checkpoint": True, "memory": _LEVERS, "edit": {"batch_size"}}
"""Settings that an adapter does not depend on but for its last digits: another machine, or other free memory, may choose others."""
_MAX_TRACEBACK = 20_000  # characters


@dataclass(frozen=True)
class Update:
    """The progress of a photo: ``stage`` is ``load``, ``embed``, ``tune`` or ``edit``; no step is done yet where ``step`` is 0."""

    name: str
    stage: str
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a photo.

    Args:
        entry: the line of the list.
        adapter: folder of the adapter; None if there is none.
        seconds: time that the photo took, in this run; of an adapter of an earlier run, that of its training.
        scores: last relative loss of every stage; ``ssim`` of the edits to the photo, by their file names.
        images: ``file``, ``eta`` and ``seed`` of every edit.
        error: got, expected and remedy, or the traceback of an unexpected one; None if all succeeded.
        warnings: the warnings of a fit in another process.
    """

    entry: Entry
    adapter: Path | None = None
    seconds: float = 0.0
    scores: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Returns the line of ``results.jsonl``."""
        entry = self.entry
        line = {"name": entry.name, "photo": str(entry.photo), "prompt": entry.prompt, "state": "failed" if self.error else "done"}
        found = {"adapter": None if self.adapter is None else str(self.adapter), "seconds": round(self.seconds, 3), "scores": self.scores}
        return {**line, **found, "images": self.images, "error": self.error, "asked": digest(entry)}


def _asked(entry: Entry) -> dict[str, Any]:
    """Everything that the adapter of a line depends on but the content of the photo."""
    region = None if entry.region is None else list(entry.region)
    return {"prompt": entry.prompt, "region": region, "settings": _settings(entry.config)}


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NO_RESULT)


def digest(entry: Entry) -> str:
    """Returns a digest of what a line asks for, by which a later run knows whether it has changed: of the photo its size and time."""
    try:
        status = entry.photo.stat()
        photo = [status.st_size, status.st_mtime_ns]
    except OSError:
        photo = []
    return hashlib.sha256(json.dumps([str(entry.photo), photo, _asked(entry)], sort_keys=True).encode()).hexdigest()[:16]


def _changes(entry: Entry, adapter: Adapter, same_photo: bool) -> list[str]:
    """What differs between what a line asks for and an adapter, one phrase each; nothing if it is that of the line."""
    record = adapter.record
    region = None if record.source.region is None else list(record.source.region)
    made = {"prompt": record.prompt, "region": region, "settings": _settings(record.config)}
    found = differences(made, _asked(entry))
    if not found and not same_photo and record.source.sha256 != hashlib.sha256(entry.photo.read_bytes()).hexdigest():
        found = ["the photo was another file"]
    return found


def stored(entry: Entry, store: Store, same_photo: bool = False) -> Adapter | None:
    """Returns the adapter of a line if it is in the store; None if there is none.

    Args:
        entry: the line.
        store: the store.
        same_photo: whether the photo is known to be the one that was fitted; otherwise it is read and hashed.

    Raises:
        ImagicError: the adapter of that name is another one, or its record cannot be read.
        OSError: the photo cannot be read.
    """
    if not (store.root / entry.name).exists():
        return None
    adapter = store.read(entry.name, verify=False)
    if found := _changes(entry, adapter, same_photo):
        got = f"{adapter.folder} is another adapter: {'; '.join(found[:5])}"
        raise ImagicError(got, "an unused name, or the adapter that the list asks for", "choose another name, or use --overwrite")
    return adapter


def scores_of(adapter: Adapter) -> dict[str, Any]:
    """Returns the scores that the record of an adapter holds: the last relative loss of every stage."""
    return {"relative_loss": {name: one.relative_loss for name, one in adapter.record.stages.items() if one.relative_loss is not None}}


def explained(error: Exception) -> dict[str, str]:
    """Returns an error as JSON values: what was got, what was expected, what to do; of an unexpected one also its traceback."""
    if isinstance(error, ImagicError):
        return {"got": error.got, "expected": error.expected, "remedy": error.remedy}
    text = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    got = f"an unexpected error ({type(error).__name__}: {error})"[:2000]
    return {"got": got, "expected": "no error", "remedy": "see traceback in results.jsonl", "traceback": text}
