"""What the pages share: the store, its queue, the uploads and the supervisor of the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.store import Store
from .jobs import Queue
from .masks import PhotoMasks
from .places import places
from .supervisor import Supervisor
from .uploads import Uploads


@dataclass(frozen=True)
class Studio:
    """A running studio.

    Args:
        store: the adapters.
        queue: the jobs.
        supervisor: of the workers.
        uploads: the photos.
        masks: the masks of photos.
        base: the base that a new fit starts with.
    """

    store: Store
    queue: Queue
    supervisor: Supervisor
    uploads: Uploads
    masks: PhotoMasks
    base: str | None = None

    @classmethod
    def of(cls, folder: Path, base: str | None = None) -> Studio:
        """Returns the studio of the folder of a store."""
        queue = Queue(folder)
        uploads = Uploads(queue)
        return cls(Store(folder), queue, Supervisor(queue, places()), uploads, PhotoMasks(queue, uploads), base)
