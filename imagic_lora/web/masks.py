"""The masks of photos: what later edits of a photo may change. No command stores one, so the studio keeps them beside its queue."""

from __future__ import annotations

import re
import time
from contextlib import suppress

from ..adapters.durable import write_text
from ..adapters.store import Store
from ..adapters.writing import writable
from ..core.errors import ImagicError
from .jobs import Queue
from .uploads import Uploads

_KEEP = 7 * 24 * 3600.0  # seconds that the mask of a photo without an adapter is kept


class PhotoMasks:
    """At most one mask for each photo, by the hash of the photo's file: it belongs to every adapter of the photo, under any name.

    Args:
        queue: the queue, beside which the masks are.
        uploads: holds their files.
    """

    def __init__(self, queue: Queue, uploads: Uploads) -> None:
        self.folder = queue.root / "masks"
        self._store, self._uploads = Store(queue.store), uploads

    def of(self, sha256: str) -> str:
        """Returns the path of the mask of a photo, as an upload; empty if it has none.

        Args:
            sha256: hash of the photo's file.
        """
        with suppress(OSError, UnicodeDecodeError, ImagicError):  # none was kept, or its file is gone
            stored = (self.folder / _checked(sha256)).read_text("utf-8")
            self._uploads.path(stored)
            return stored
        return ""

    def set(self, sha256: str, stored: str) -> None:
        """Keeps a mask for a photo, instead of the one that it has; an empty path removes that one.

        Args:
            sha256: hash of the photo's file.
            stored: the path of the mask, as an upload.

        Raises:
            ImagicError: there is no such upload, or the disk cannot be written to.
        """
        path = self.folder / _checked(sha256)
        if stored:
            self._uploads.path(stored)
            write_text(path, stored)
            return
        with writable(self.folder):
            path.unlink(missing_ok=True)

    def sweep(self) -> list[str]:
        """Removes masks that are older than a week and whose photo is that of no adapter; returns the uploads of the others."""
        paths = list(self.folder.glob("*")) if self.folder.is_dir() else []
        old = [path for path in paths if time.time() - path.stat().st_mtime > _KEEP]
        photos = self._photos() if old else set()
        for path in old:
            if path.name not in photos:
                with suppress(OSError):  # the next start tries again
                    path.unlink()
        return [stored for path in paths if (stored := self.of(path.name))]

    def _photos(self) -> set[str]:
        """The hashes of the photos of all adapters."""
        found = set()
        for name in self._store.names():
            with suppress(ImagicError):  # it cannot be read, so it cannot be edited
                found.add(self._store.read(name, verify=False).record.source.sha256)
        return found


def _checked(sha256: str) -> str:
    """Returns a hash; raises ImagicError for anything else: it becomes the name of a file."""
    if not re.match(r"[0-9a-f]{64}\Z", sha256):
        raise ImagicError(f"{sha256[:80]!r}", "a SHA-256 in hexadecimal", "reload the page")
    return sha256
