"""Folders that files are written to: created, checked before work starts, and errors of writing in plain words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from ..core.errors import DiskFull, ImagicError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 2**24  # bytes that are copied at once


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Creates a folder if necessary and converts errors of writing to it into ImagicError.

    Args:
        root: the folder; parents are created too.

    Raises:
        DiskFull: the disk is full.
        ImagicError: the folder cannot be written to.
    """
    try:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            flush_folder(root.parent)
        yield
    except (OSError, UnicodeError) as error:  # UnicodeError: the file system cannot encode the name
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
            got = f"the disk of {root} is full or over its quota ({shutil.disk_usage(existing).free / 2**20:,.0f} MiB free)"
            remedy = "free some space and run the command again, with --resume for an interrupted fit; everything stored before is intact"
            raise DiskFull(got, "free space for the files", remedy) from error
        raise ImagicError(
            f"{root} cannot be written to ({getattr(error, 'strerror', None) or error})", "a writable folder", "choose another folder"
        ) from error


def flush_folder(folder: Path) -> None:
    """Flushes the directory entries of a folder to the disk."""
    if os.name == "nt":
        return  # Windows cannot flush a directory; NTFS journals its entries
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_outputs(folder: Path, names: Iterable[str]) -> None:
    """Creates a folder and checks that files can be written to it, before any work is done for them.

    Args:
        folder: the output folder.
        names: paths of the files, relative to the folder. A file of that name may exist; it would be replaced.

    Raises:
        ImagicError: the disk is full; the folder cannot be written to; a name belongs to something else than a writable file.
    """
    with writable(folder):
        with TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in names):
            for parent in path.parents[: len(path.parents) - len(folder.parents) - 1]:
                if parent.exists() and not parent.is_dir():
                    raise ImagicError(f"{parent} is not a folder", "a folder, or an unused name", "choose another folder, or move it")
            if path.exists() and not path.is_file():
                raise ImagicError(f"{path} is not a file", "a file, or an unused name", "choose another folder, or move it")
            if path.exists() and not os.access(path, os.W_OK):
                raise ImagicError(f"{path} cannot be written to", "a writable file", "choose another folder, or change its permissions")


@contextmanager
def hidden_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder for files until they get their final names; deleted at the end, also if an exception interrupts that.

    Args:
        parent: where it is created.
        prefix: how its name begins: with a dot.

    Raises:
        ImagicError: it cannot be deleted.
    """
    folder = parent / f"{prefix}{uuid4().hex}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        try:
            delete(folder)
        except BaseException:  # Ctrl-C too: it is deleted all the same
            delete(folder)
            raise


def pieces(path: Path) -> Iterator[bytes]:
    """Reads a file in pieces, to copy it."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def exists(path: Path) -> bool:
    """Returns whether something has this name: a folder, a file, or a link, also one that leads nowhere."""
    return path.is_symlink() or path.exists()


def delete(path: Path) -> None:
    """Deletes a folder with its content, a file, or a link, but not what a link leads to. Nothing happens if there is none.

    Raises:
        ImagicError: something in it cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif exists(path):
            path.unlink()
    except OSError as error:
        got = f"{error.filename or path} cannot be deleted ({error.strerror})"
        raise ImagicError(got, "files that this user may delete", f"delete {path} by hand, or change its permissions") from error
