"""Folders that are written atomically: written under a hidden name, hashed, flushed, renamed. A manifest of hashes verifies them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bases.loading.vetting import parsed_json
from ..core.errors import ImagicError, ImagicWarning, unreadable
from ..core.validation import first_problem
from .writing import delete, exists, flush_folder, writable

_OWN_HASH = re.compile(rb',\n  "sha256": "[0-9a-f]{64}"\n}\n\Z')
_MAX_MANIFEST = 2**20  # bytes; a larger manifest is not read
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The fields of a folder's manifest, except its own hash. ``files`` maps every other file of the folder to its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    files: dict[FileName, Sha256] = {}


M = TypeVar("M", bound=Manifest)


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
        fields = manifest.model_dump(mode="json") | {"files": dict(sorted(self.files.items()))}
        self.write(name, [_serialised(fields | {"sha256": _own_hash(fields)})])


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
        except BaseException:
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


def read_manifest(folder: Path, name: str, model: type[M]) -> M:
    """Reads a manifest and verifies it against its own hash.

    Args:
        folder: the folder that the manifest describes.
        name: file name of the manifest.
        model: the pydantic model of its fields.

    Raises:
        ImagicError: the file is missing or cannot be read, does not match its hash, holds NaN or infinity, or does not fit the model.
    """
    path = folder / name
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MANIFEST:
            raise ValueError(f"it is missing or larger than {_MAX_MANIFEST:,} bytes")
        content = path.read_bytes()
        fields = parsed_json(content)
        json.dumps(fields, ensure_ascii=False).encode()  # raises UnicodeError for a lone surrogate, which JSON can contain
        if fields.pop("sha256", None) != _hash_without_its_own(content):
            raise ValueError("it does not match its hash")
        return model.model_validate(fields)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            problem = first_problem(error)
            reason = f"{problem.got}, expected {problem.expected}" if problem.place else problem.got
        else:
            reason = str(error).splitlines()[0]
        raise ImagicError(f"{path} is not a valid manifest ({reason})", "an unchanged manifest", "create or copy it again") from error


def changed_file(folder: Path, manifest: Manifest) -> Path | None:
    """Returns the path of the first file that is missing or does not match its hash; None if every file matches.

    Raises:
        ImagicError: a file cannot be read.
    """
    for name, digest in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file() or _sha256(path) != digest:
                return path
        except OSError as error:
            raise unreadable(path, error) from error
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _serialised(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()


def _hash_without_its_own(content: bytes) -> str:
    """The hash of what a manifest was before its own hash was added as the last key; much cheaper than serialising it again."""
    last_key = _OWN_HASH.search(content)
    return hashlib.sha256(content[: last_key.start()] + b"\n}\n").hexdigest() if last_key else ""


def _own_hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_serialised(fields)).hexdigest()
