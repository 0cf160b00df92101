"""Folders that are whole or not there: written hidden, hashed, flushed, renamed into place; and not believed if a byte has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import ImagicError

_MAX_RECORD = 2**20  # bytes of a record that are read
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a folder's record says, besides its own hash: at least the hash of every other file that belongs to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    files: dict[FileName, Sha256] = {}


R = TypeVar("R", bound=Manifest)


class AtomicWriter:
    """A folder in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> None:
        """Writes a file, in a folder below where the name says so, hashes it and flushes it to the disk.

        Args:
            content: in pieces.
        """
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for piece in content:
                digest.update(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        self.files[name] = digest.hexdigest()

    def write_manifest(self, name: str, record: Manifest) -> None:
        """Writes the record: with the hashes of all that was written before, and a hash of its own."""
        told = record.model_dump(mode="json") | {"files": dict(sorted(self.files.items()))}
        self.write(name, [_text(told | {"sha256": _own_hash(told)})])


@contextmanager
def atomic_folder(final: Path) -> Iterator[AtomicWriter]:
    """A hidden folder that takes the place of ``final`` when all is written; only then what was there goes.

    At whatever moment the power fails, :func:`recover` finds the old folder or the new one, whole. The last thing written must be the
    record (:meth:`AtomicWriter.write_manifest`). One writer at a time.

    Raises:
        ImagicError: the disk is full, or cannot be written to; what was there before still is.
    """
    hidden, old = _hidden(final)
    with writable(final.parent):
        recover(final)
        placed = False
        try:
            hidden.mkdir()
            made = AtomicWriter(hidden)
            yield made
            for folder in [*(path for path in hidden.iterdir() if path.is_dir()), hidden]:
                _flush(folder)
            if final.exists():
                final.rename(old)
                _flush(final.parent)
            hidden.rename(final)
            placed = True
            _flush(final.parent)
        except BaseException:
            if placed:
                final.rename(hidden)
            recover(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def remove(final: Path) -> None:
    """Removes a folder, if it is there, so that no half of it ever bears its name; what is cut off, :func:`recover` finishes."""
    hidden, _ = _hidden(final)
    recover(final)
    if final.exists():
        final.rename(hidden)
        _flush(final.parent)
        shutil.rmtree(hidden, ignore_errors=True)


def recover(final: Path) -> None:
    """Undoes what a writer that was cut off has left: the old folder is put back, the half-written one removed."""
    hidden, old = _hidden(final)
    if old.exists() and not final.exists():
        old.rename(final)
        _flush(final.parent)
    for left in (hidden, old):
        shutil.rmtree(left, ignore_errors=True)


def interrupted_writes(root: Path) -> list[str]:
    """Names of the folders in ``root`` whose writers left something behind, or are still at work."""
    ends = (".part", ".old")
    return sorted({path.name[1:].removesuffix(end) for end in ends for path in root.glob(f".*{end}")})


def _hidden(final: Path) -> tuple[Path, Path]:
    return final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.old")


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """The folder is there; failing to write below it is an error that the user can mend.

    Raises:
        ImagicError: the disk is full, or cannot be written to.
    """
    try:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            _flush(root.parent)
        yield
    except (OSError, UnicodeError) as error:  # a name may be none
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            there = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
            got = f"the disk of {root} is full, or its quota used up ({shutil.disk_usage(there).free / 2**20:,.0f} MiB free)"
            remedy = "free some space, then run it again, with --resume where a fit was interrupted; nothing that was stored before is lost"
            raise ImagicError(got, "room for what is to be written", remedy) from error
        raise ImagicError(
            f"{root} cannot be written to ({getattr(error, 'strerror', None) or error})", "a folder to write to", "choose another"
        ) from error


def read_manifest(folder: Path, name: str, kind: type[R]) -> R:
    """The record of a folder, if not a byte of it has changed.

    Raises:
        ImagicError: it is missing, has changed, or is not a record of this kind.
    """
    path = folder / name
    try:
        if not path.is_file() or path.stat().st_size > _MAX_RECORD:
            raise ValueError("no file of a record's size")
        text = path.read_bytes()
        told = json.loads(text)
        json.dumps(told, ensure_ascii=False).encode()  # half a letter, which JSON can hold, is no text
        if not isinstance(told, dict) or text != _text(told) or told.pop("sha256", None) != _own_hash(told):
            raise ValueError("its own hash is another")
        return kind.model_validate(told)
    except (OSError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise ImagicError(f"{path} cannot be believed ({first})", "a record as it was written", "make or copy it again") from error


def changed_file(folder: Path, record: Manifest) -> Path | None:
    """The first file that is missing, cannot be read, or is not what was written."""
    for name, digest in record.files.items():
        path = folder / name
        try:
            if not path.is_file() or _sha256(path) != digest:
                return path
        except OSError:
            return path
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(told: dict[str, Any]) -> bytes:
    return (json.dumps(told, indent=2) + "\n").encode()


def _own_hash(told: dict[str, Any]) -> str:
    return hashlib.sha256(_text(told)).hexdigest()


def _flush(folder: Path) -> None:
    """The entries of a folder, onto the disk."""
    if os.name == "nt":
        return  # which cannot be asked to, and keeps them in order itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
