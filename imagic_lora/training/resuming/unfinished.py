"""An unfinished fit of a name: what is left of it before a fit starts, and after it."""

from __future__ import annotations

import warnings

from ...adapters.store import Store
from ...core.errors import ImagicError, ImagicWarning
from ...core.runtime import Processes
from .checkpoints import START_OVER, Checkpoint, Checkpoints


def clear(saved: Checkpoints, name: str) -> None:
    """Removes the checkpoints of a fit whose adapter is stored, or warns that they remain."""
    try:
        saved.clear()
    except (OSError, ImagicError) as error:
        warnings.warn(f"the checkpoints of {name} remain: {error}", ImagicWarning, stacklevel=3)


def check_unfinished(store: Store, name: str, saved: Checkpoints, overwrite: bool, resume: bool) -> None:
    """Raises ImagicError if the name belongs to an adapter or an unfinished fit that is neither resumed nor overwritten."""
    store.check_free(name, overwrite)
    if saved.any() and not resume and not overwrite:
        got = f"an unfinished fit of {name} is in {saved.folder}"
        raise ImagicError(got, "a choice between continuing it and starting over", "add --resume, or --overwrite")


def checkpoint_to_resume(saved: Checkpoints, name: str, processes: Processes) -> Checkpoint:
    """Returns the newest intact checkpoint of a name.

    Raises:
        ImagicError: there is none.
    """
    checkpoint = saved.newest(rename_broken=processes.main)
    if checkpoint is not None:
        return checkpoint
    if saved.any():
        raise ImagicError(f"there is no intact checkpoint of {name} to resume", "at least one intact checkpoint", START_OVER)
    raise ImagicError(f"there is no checkpoint of {name} to resume", "an interrupted fit", "leave out --resume to start a new fit")
