"""A stored adapter on the disk: its folder, its record, its files. No torch here."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ImagicError
from .atomic import read_manifest
from .record import EMBEDDINGS, RECORD, REMEDY, Record


class Adapter:
    """A stored adapter: its folder and its record. :mod:`imagic_lora.adapters.contents` reads what the files hold."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @property
    def name(self) -> str:
        """Its name in the store, whatever its record says."""
        return self.folder.name

    @property
    def size(self) -> int:
        """Bytes of the trained weights and the embeddings."""
        files = [self.folder / file for part in self.record.parts for file in (*part.files, EMBEDDINGS)]
        return sum(file.stat().st_size for file in files if file.is_file())

    def listed(self, file: str) -> Path:
        """The path of a file whose hash is in the record.

        Raises:
            ImagicError: the record does not list it.
        """
        if file not in self.record.files:
            raise ImagicError(f"{self.folder / file} is not on the adapter's record", "a file whose hash is known", REMEDY)
        return self.folder / file

    def check_unchanged(self) -> None:
        """Raises ImagicError if the folder no longer holds the adapter that this record belongs to."""
        if read_manifest(self.folder, RECORD, Record) != self.record:
            raise ImagicError(f"{self.folder} holds another adapter than when it was read", "the same one", "read it again from its store")
