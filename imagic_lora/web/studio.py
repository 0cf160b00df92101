"""What the pages share: the store, its queue, the uploads and the supervisor of the worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.store import Store
from .jobs import Queue
from .supervisor import Supervisor
from .uploads import Uploads


@dataclass(frozen=True)
class Studio:
    """A running studio.

    Args:
        store: the adapters.
        queue: the jobs.
        supervisor: of the worker.
        uploads: the photos.
        base: the base that a new fit starts with.
    """

    store: Store
    queue: Queue
    supervisor: Supervisor
    uploads: Uploads
    base: str | None = None

    @classmethod
    def of(cls, folder: Path, base: str | None = None) -> Studio:
        """Returns the studio of the folder of a store."""
        queue = Queue(folder)
        return cls(Store(folder), queue, Supervisor(queue), Uploads(queue), base)
