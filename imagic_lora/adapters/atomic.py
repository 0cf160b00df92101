"""Folders that are written atomically: written under a hidden name, hashed, flushed, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import ImagicError
from .manifest import Manifest, manifest_bytes

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
                _flush(folder)
            if final.exists():
                final.rename(old)
                _flush(final.parent)
            hidden.rename(final)
            renamed = True
            _flush(final.parent)
        except BaseException:
            if renamed:
                final.rename(hidden)
            recover(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def remove(final: Path) -> None:
    """Removes a folder if it exists.

    The folder is renamed first, so that no incomplete folder has its name. :func:`recover` completes an interrupted removal.
    """
    hidden, _ = _hidden_paths(final)
    recover(final)
    if final.exists():
        final.rename(hidden)
        _flush(final.parent)
        shutil.rmtree(hidden, ignore_errors=True)


def recover(final: Path) -> None:
    """Cleans up after an interrupted writer: restores the old folder and removes the incomplete one."""
    hidden, old = _hidden_paths(final)
    if old.exists() and not final.exists():
        old.rename(final)
        _flush(final.parent)
    for leftover in (hidden, old):
        shutil.rmtree(leftover, ignore_errors=True)


def interrupted_writes(root: Path) -> list[str]:
    """Returns the names of the folders in ``root`` whose writer was interrupted or is still running, sorted."""
    suffixes = (".part", ".old")
    return sorted({path.name[1:].removesuffix(suffix) for suffix in suffixes for path in root.glob(f".*{suffix}")})


def _hidden_paths(final: Path) -> tuple[Path, Path]:
    """The path of the folder that is being written, and the path of the old folder while it is replaced."""
    return final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.old")


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Creates a folder if necessary and converts errors of writing to it into ImagicError.

    Args:
        root: the folder; parents are created too.

    Raises:
        ImagicError: the disk is full or the folder cannot be written to.
    """
    try:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            _flush(root.parent)
        yield
    except (OSError, UnicodeError) as error:  # UnicodeError: the file system cannot encode the name
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
            got = f"the disk of {root} is full or over its quota ({shutil.disk_usage(existing).free / 2**20:,.0f} MiB free)"
            remedy = "free some space and run the command again, with --resume for an interrupted fit; everything stored before is intact"
            raise ImagicError(got, "free space for the files", remedy) from error
        raise ImagicError(
            f"{root} cannot be written to ({getattr(error, 'strerror', None) or error})", "a writable folder", "choose another folder"
        ) from error


def _flush(folder: Path) -> None:
    """Flushes the directory entries of a folder to the disk."""
    if os.name == "nt":
        return  # Windows cannot flush a directory; NTFS journals its entries
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
