"""A stored adapter on disk: its folder, its record and its files. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..core.errors import ImagicError
from .manifest import read_manifest
from .record import EMBEDDINGS, RECORD, REMEDY, SOURCE, Record


class Adapter:
    """A stored adapter: its folder and its record. :mod:`imagic_lora.adapters.contents` reads the content of the files.

    Args:
        folder: its folder.
        record: its record.
        photo: the photo's file, for an adapter that withholds its photo.
    """

    def __init__(self, folder: Path, record: Record, photo: Path | None = None) -> None:
        self.folder, self.record, self.photo = folder, record, photo

    @property
    def withheld(self) -> bool:
        """Whether it was sent without its photo: without the canvas that starts from the photo need, and without previews."""
        return self.record.source.withheld is not None

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
    def photo_size(self) -> int:
        """Size of the stored file of the photo in bytes; 0 if it is not stored."""
        file = self.record.source.file
        return (self.folder / file).stat().st_size if file and (self.folder / file).is_file() else 0

    @property
    def content_sha256(self) -> str:
        """Hash of everything that an edit reads: weights, embeddings, photo and base. It is the same under another name or settings.

        It is also the same whether the photo is stored, in whole or on its canvas, or not: the hashes of both are part of it in any case.
        """
        record, withheld = self.record, self.record.source.withheld
        read = {file: record.files.get(file) for file in (*record.weight_files, EMBEDDINGS, SOURCE)}
        read |= {SOURCE: withheld.sha256} if withheld else {}
        source = record.source.model_dump(mode="json", exclude={"file", "withheld"})
        content = [read, source, record.base.fingerprint, record.config.memory.quantize]
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
