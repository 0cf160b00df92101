"""Folders that are written atomically: written under a hidden name, hashed, flushed, renamed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import ImagicError, ImagicWarning
from .manifest import Manifest, manifest_bytes
from .writing import delete, exists, flush_folder, writable


class AtomicWriter:
    """Writes the files of a folder and collects their hashes.

    Args:
        folder: an existing folder; usually the hidden one of :func:`atomic_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> None:
        """Writes a new file, hashes it and flushes it to the disk.

        Args:
            name: path relative to the folder, at most one level deep; the subfolder is created.
            content: the bytes of the file, in pieces.
        """
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for piece in content:
                digest.update(piece)
                remaining = memoryview(piece)
                while remaining:
                    remaining = remaining[os.write(handle, remaining) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        self.files[name] = digest.hexdigest()

    def write_manifest(self, name: str, manifest: Manifest) -> None:
        """Writes the manifest with the hashes of all files written before and a hash of its own content.

        Args:
            name: file name of the manifest.
            manifest: its ``files`` are replaced.
        """
        self.write(name, [manifest_bytes(manifest, self.files)])


@contextmanager
def atomic_folder(final: Path) -> Iterator[AtomicWriter]:
    """Writes a folder under a hidden name and renames it to ``final`` when the block ends; an existing folder is then replaced.

    After a power failure at any moment, :func:`recover` restores either the complete old folder or the complete new one. The block must
    write the manifest last (:meth:`AtomicWriter.write_manifest`). Only one writer at a time is allowed. An exception leaves the old folder
    unchanged.

    Args:
        final: path of the folder.

    Yields:
        The writer of the hidden folder.

    Raises:
        ImagicError: the disk is full or cannot be written to.
    """
    hidden, old = _hidden_paths(final)
    with writable(final.parent):
        recover(final)
        renamed = False
        try:
            hidden.mkdir()
            writer = AtomicWriter(hidden)
            yield writer
            for folder in [*(path for path in hidden.iterdir() if path.is_dir()), hidden]:
                flush_folder(folder)
            if exists(final):
                final.rename(old)
                flush_folder(final.parent)
            hidden.rename(final)
            renamed = True
            flush_folder(final.parent)
        except BaseException:  # Ctrl-C too: the new folder gives the name back
            if renamed:
                final.rename(hidden)
            with suppress(ImagicError):  # the error of the write is the one to report; the next writer cleans up
                recover(final)
            raise
        try:
            delete(old)
        except ImagicError as error:  # the new folder is in place
            warnings.warn(f"the folder that was replaced remains: {error}", ImagicWarning, stacklevel=3)


def remove(final: Path) -> None:
    """Removes a folder if it exists; of a link, the link only.

    The folder is renamed first, so that no incomplete folder has its name. :func:`recover` completes an interrupted removal.

    Raises:
        ImagicError: something in it cannot be deleted.
    """
    hidden, _ = _hidden_paths(final)
    recover(final)
    if exists(final):
        final.rename(hidden)
        flush_folder(final.parent)
        delete(hidden)


def recover(final: Path) -> None:
    """Cleans up after an interrupted writer: restores the old folder and removes the incomplete one.

    Raises:
        ImagicError: something cannot be deleted, so that the folder cannot be written.
    """
    hidden, old = _hidden_paths(final)
    if exists(old) and not exists(final):
        old.rename(final)
        flush_folder(final.parent)
    for leftover in (hidden, old):
        delete(leftover)


def interrupted_writes(root: Path) -> list[str]:
    """Returns the names of the folders in ``root`` whose writer was interrupted or is still running, sorted."""
    suffixes = (".part", ".old")
    return sorted({path.name[1:].removesuffix(suffix) for suffix in suffixes for path in root.glob(f".*{suffix}")})


def _hidden_paths(final: Path) -> tuple[Path, Path]:
    """The path of the folder that is being written, and the path of the old folder while it is replaced."""
    return final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.old")
