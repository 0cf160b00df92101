"""A stored adapter on disk: its folder, its record and its files. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..core.errors import ImagicError
from .manifest import read_manifest
from .record import EMBEDDINGS, RECORD, REMEDY, SOURCE, Record


class Adapter:
    """A stored adapter: its folder and its record. :mod:`imagic_lora.adapters.contents` reads the content of the files."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @property
    def name(self) -> str:
        """The adapter's name in its store: the name of the folder, which can differ from the name in the record."""
        return self.folder.name

    @property
    def size(self) -> int:
        """Size of the trained weights and the embeddings in bytes."""
        files = [self.folder / file for file in (*self.record.weight_files, EMBEDDINGS)]
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def content_sha256(self) -> str:
        """Hash of everything that an edit reads: weights, embeddings, photo and base. It is the same under another name or settings."""
        record = self.record
        read = {file: record.files.get(file) for file in (*record.weight_files, EMBEDDINGS, SOURCE)}
        content = [read, record.source.model_dump(mode="json"), record.base.fingerprint, record.config.memory.quantize]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def listed(self, file: str) -> Path:
        """Returns the path of a file that the record lists with a hash.

        Args:
            file: path relative to the adapter's folder.

        Raises:
            ImagicError: the record does not list the file.
        """
        if file not in self.record.files:
            raise ImagicError(f"{self.folder / file} is not listed in the adapter's record", "a file with a recorded hash", REMEDY)
        return self.folder / file

    def check_unchanged(self) -> None:
        """Raises ImagicError if the folder no longer holds the adapter that this record belongs to."""
        if read_manifest(self.folder, RECORD, Record) != self.record:
            raise ImagicError(
                f"{self.folder} holds another adapter than when it was read", "an unchanged adapter", "read it again from its store"
            )
