"""Folders that files are written to: created, checked before work starts, and errors of writing in plain words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import ImagicError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            flush_folder(root.parent)
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


def flush_folder(folder: Path) -> None:
    """Flushes the directory entries of a folder to the disk."""
    if os.name == "nt":
        return  # Windows cannot flush a directory; NTFS journals its entries
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
