"""Uploaded photos: stored under names of our own in the folder of the queue, with a preview that is upright and has no metadata."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..adapters.writing import writable
from ..core.errors import ImagicError
from ..photos.reading import read_photo
from .guard import MAX_UPLOAD
from .jobs import Queue

_NAME = r"[0-9a-f]{32}(\.[a-z0-9]{1,5})?\Z"
_PREVIEW = 768  # pixels of its longer side
_KEEP = 7 * 24 * 3600.0  # seconds that an upload without a job is kept


class Uploads:
    """The uploads of a queue.

    Args:
        queue: the queue.
    """

    def __init__(self, queue: Queue) -> None:
        self.folder = queue.root / "uploads"
        self._queue = queue

    def add(self, name: str, data: bytes) -> str:
        """Stores a photo, and returns its path relative to the folder of the queue.

        Args:
            name: its name on the machine of the user; only the ending is used.
            data: its content.

        Raises:
            ImagicError: it is no photo that ``fit`` reads, or too large.
        """
        if not data or len(data) > MAX_UPLOAD:
            raise ImagicError(f"a photo of {len(data):,} bytes", f"1 to {MAX_UPLOAD:,} bytes", "choose another photo")
        ending = Path(name).suffix.lower()
        stored = secrets.token_hex(16) + (ending if re.match(r"\.[a-z0-9]{1,5}\Z", ending) else "")
        path = self.folder / stored
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            photo = read_photo(path).image
            photo.thumbnail((_PREVIEW, _PREVIEW), Image.Resampling.LANCZOS)
            clean = Image.frombytes("RGB", photo.size, photo.convert("RGB").tobytes())  # pixels only
            clean.save(self.preview(stored), "PNG")
        except ImagicError as error:
            path.unlink()
            shown = re.sub(r"[^A-Za-z0-9._ -]", "?", Path(name).name)[:100]
            raise ImagicError(error.got.replace(str(path), shown), error.expected, error.remedy) from error
        return f"uploads/{stored}"

    def size(self, stored: str) -> tuple[int, int]:
        """Returns width and height of the upright photo."""
        return read_photo(self.path(stored)).image.size

    def path(self, stored: str) -> Path:
        """Returns the file of an upload.

        Raises:
            ImagicError: the name is not one that was given here.
        """
        name = stored.removeprefix("uploads/")
        if not re.match(_NAME, name) or not (self.folder / name).is_file():
            raise ImagicError(f"no upload {stored[:80]!r}", "a photo that was uploaded", "upload it again")
        return self.folder / name

    def preview(self, stored: str) -> Path:
        """Returns the file of the preview of an upload."""
        return self.folder / f"{Path(stored).name}.preview"

    def sweep(self) -> None:
        """Deletes uploads that no job uses and that are older than a week."""
        used = {str(job.arguments.get(name)) for job in self._queue.jobs() for name in ("image", "mask", "photo", "keep")}
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if f"uploads/{path.name.removesuffix('.preview')}" not in used and time.time() - path.stat().st_mtime > _KEEP:
                with suppress(OSError):  # the next start tries again
                    path.unlink()
