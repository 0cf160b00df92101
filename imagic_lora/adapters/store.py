"""A folder of adapters: one folder per adapter, written atomically, with one writer per name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..core.errors import ImagicError, unreadable
from ..core.text import check_utf8
from .adapter import Adapter
from .atomic import AtomicWriter, atomic_folder, interrupted_writes, recover, remove
from .manifest import changed_file, read_manifest
from .record import NAME, RECORD, REMEDY, EtaRecord, Record
from .writing import exists, flush_folder, pieces, writable

_RECOVERY_SECONDS = 0.5  # longer than the recovery of an interrupted write takes


def _write_pid(handle: int) -> None:
    """Writes the id of this process into a lock file, unless the disk is full."""
    with suppress(OSError):  # the id is only for the message of another process
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())


def _lock_owner(path: Path) -> str:
    """Describes the process that holds a lock, by its id if the lock file contains it."""
    try:
        pid = int(path.read_text()) if path.is_file() else 0  # a pipe of that name could block
        return f"process {pid}" if psutil.pid_exists(pid) else "another process"  # the owner has not written its id yet
    except (OSError, ValueError, OverflowError):
        return "another process"


def check_name(name: str) -> str:
    """Returns the name if it is valid.

    Raises:
        ImagicError: the name contains a path, starts with a dot, is empty, or is longer than 100 characters.
    """
    if not re.match(NAME, name):
        raise ImagicError(
            f"{name!r} is not a valid name",
            "1 to 100 letters, digits, '.', '_' and '-', the first a letter or a digit; no path",
            "choose another name",
        )
    return name


def folded(name: str) -> str:
    """The name as file systems compare it that ignore case; Windows ignores dots at its end, too."""
    return name.casefold().rstrip(".")


def _may_hold(file: Path) -> bool:
    """Returns whether a file exists, or may exist in a folder that cannot be read."""
    try:
        return file.is_file()
    except OSError:
        return True


def _may_hold_checkpoints(folder: Path) -> bool:
    """Returns whether a folder holds checkpoints, or may hold some because it cannot be read."""
    try:
        return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError:
        return True


class Store:
    """A folder of adapters and of the checkpoints of unfinished fits.

    Args:
        root: created when the first adapter is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locked_name: str | None = None

    @contextmanager
    def locked(self, name: str, timeout: float = _RECOVERY_SECONDS) -> Iterator[Store]:
        """Locks a name for writing while the context is open. Interrupted writes of that name are recovered first.

        Args:
            name: name of an adapter.
            timeout: seconds to wait for another holder of the lock; :meth:`names` may hold the lock briefly to clean up after a crash.

        Yields:
            A store that owns the lock. Only this store, and no other process, may write the name inside the ``with`` block.

        Raises:
            ImagicError: another process or another store of this process holds the lock, or the folder cannot be written to.
        """
        if check_name(name) == self._locked_name:
            yield self
            return
        path = self.root / f".{name}.lock"
        # The operating system releases the lock of a dead process. A fit can start in one thread and be closed in another.
        lock = FileLock(path, thread_local=False, on_acquired=_write_pid)
        with writable(self.root):
            try:
                lock.acquire(timeout=timeout, poll_interval=0.02)
            except Timeout as error:
                got = f"{self.root / name} is being written by {_lock_owner(path)}"
                raise ImagicError(got, "one writer per name", "wait until it is done, or choose another --name") from error
        holder = Store(self.root)
        try:
            for folder in (self.root / name, self.checkpoints(name)):
                recover(folder)
            holder._locked_name = name
            yield holder
        finally:
            holder._locked_name = None
            with suppress(OSError):  # Windows does not delete an open file
                path.unlink()  # a waiting process that has the file open detects that it was deleted
            lock.release()

    def check_free(self, name: str, overwrite: bool) -> None:
        """Checks that an adapter of this name can be written. A fit calls it before training.

        Raises:
            ImagicError: the name is invalid, exists and ``overwrite`` is False, or is locked; another name is the same where file systems
                ignore case; or the folder cannot be written to, or its path is not UTF-8, so that no adapter in it could be read.
        """
        check_utf8(str(self.root), "the path of the store")
        with self.locked(name):
            if exists(self.root / name) and not overwrite:
                raise ImagicError(f"{self.root / name} exists", "an unused name", "choose another --name, or use --overwrite")
            if not exists(self.root / name) and (twin := self._twin(name)):
                got = f"{self.root / twin} exists, and {name} is the same name on file systems that ignore case"
                raise ImagicError(got, "names that differ in more than case and final dots", "choose another --name")

    def names(self) -> list[str]:
        """Returns the names of the adapters, sorted, with those of folders that may not be read: :meth:`read` gives the reason.

        Raises:
            ImagicError: the store is no folder or cannot be read.
        """
        self._recover_all()
        return [name for name in self._entries() if re.match(NAME, name) and _may_hold(self.root / name / RECORD)]

    def read(self, name: str, verify: bool = True) -> Adapter:
        """Reads an adapter and verifies the hash of every file.

        Args:
            name: name of the adapter.
            verify: False reads and verifies the record only, which is enough to list an adapter, but not to use it.

        Raises:
            ImagicError: there is no such adapter, its record is invalid or of another version, or a file is missing or has changed.
        """
        folder = self.root / check_name(name)
        if not _may_hold(folder / RECORD):
            existing = ", ".join(self.names()) or "none"
            if not _may_hold(folder / RECORD):  # names() can have recovered it
                raise ImagicError(f"no adapter {name!r} in {self.root}", f"the name of an adapter ({existing})", "see imagic-lora list")
        adapter = Adapter(folder, read_manifest(folder, RECORD, Record))
        if verify and (path := changed_file(folder, adapter.record)):
            raise ImagicError(f"{path} is missing or has changed", "a file that matches its hash", REMEDY)
        return adapter

    def write(self, record: Record, fill: Callable[[AtomicWriter], None], overwrite: bool = False) -> Adapter:
        """Writes an adapter atomically. The replaced adapter is deleted only after the new one is in place.

        Args:
            record: its ``files`` are replaced.
            fill: writes every file except the record.
            overwrite: whether an existing adapter of that name is replaced.

        Raises:
            ImagicError: as :meth:`check_free`; the disk is full; a tensor is not finite.
        """
        with self.locked(record.name) as holder:
            holder.check_free(record.name, overwrite)
            with atomic_folder(self.root / record.name) as writer:
                fill(writer)
                writer.write_manifest(RECORD, record)
        return self.read(record.name)

    def rename(self, name: str, new: str) -> Adapter:
        """Gives an adapter another name. Its files and its record stay as they are.

        Raises:
            ImagicError: there is no such adapter, the new name is taken or invalid, or a fit of either name is unfinished.
        """
        check_name(new)
        self.read(name, verify=False)
        for taken in (name, new):
            if _may_hold_checkpoints(self.checkpoints(taken)):
                got = f"a fit of {taken} is unfinished"
                raise ImagicError(got, "names without an unfinished fit", "resume it, or choose another name")
        if new == name:
            raise ImagicError(f"{name} has this name already", "another name", "choose another name")
        with self.locked(name), self.locked(new) as holder:
            holder.check_free(new, overwrite=False)
            with writable(self.root):
                (self.root / name).rename(self.root / new)
                flush_folder(self.root)
        return self.read(new, verify=False)

    def suggest_eta(self, adapter: Adapter, suggested: EtaRecord) -> Adapter:
        """Stores a suggested eta in the record of an adapter. The adapter is written again, atomically; no other file changes.

        Args:
            adapter: an adapter of this store.
            suggested: the eta, and how it was found.

        Raises:
            ImagicError: as :meth:`write`; the folder holds another adapter than when it was read.
        """
        record = adapter.record.model_copy(update={"name": adapter.name, "suggested": suggested})

        def copy(writer: AtomicWriter) -> None:
            for file in adapter.record.files:
                writer.write(file, pieces(adapter.listed(file)))

        with self.locked(adapter.name) as holder:
            adapter.check_unchanged()
            return holder.write(record, copy, overwrite=True)

    def remove(self, name: str) -> None:
        """Removes an adapter and the checkpoints of an unfinished fit of that name.

        Raises:
            ImagicError: neither exists, the name is being written, or something cannot be deleted.
        """
        final = self.root / check_name(name)
        if not exists(final) and not exists(self.checkpoints(name)):
            self.read(name)  # raises if there is nothing of this name, even after recovery
        with self.locked(name), writable(self.root):
            for folder in (final, self.checkpoints(name)):
                remove(folder)

    def checkpoints(self, name: str) -> Path:
        """Returns the folder of the checkpoints of a fit of that name."""
        return self.root / f".{check_name(name)}.checkpoints"

    def unfinished(self) -> list[str]:
        """Returns the names whose fit was interrupted or is still running, sorted."""
        folders = [name for name in self._entries() if name.startswith(".") and name.endswith(".checkpoints")]
        return sorted(name[1:].removesuffix(".checkpoints") for name in folders if _may_hold_checkpoints(self.root / name))

    def _entries(self) -> list[str]:
        """Returns the names of everything in the folder of the store, sorted; nothing if there is no such folder yet."""
        try:
            return sorted(os.listdir(self.root))  # noqa: PTH208  # a path for each of ten thousand adapters takes longer than the listing
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unreadable(self.root, error) from error

    def _twin(self, name: str) -> str | None:
        """Returns the name of an adapter or of an unfinished fit that differs from ``name`` in case or final dots only."""
        wanted = folded(name)
        for entry in self._entries():
            unfinished = entry.startswith(".") and entry.endswith(".checkpoints")
            other = entry[1:].removesuffix(".checkpoints") if unfinished else entry
            if folded(other) == wanted and other != name and re.match(NAME, other):  # the cheapest test first
                if unfinished and not _may_hold_checkpoints(self.root / entry):
                    continue
                return other
        return None

    def _recover_all(self) -> None:
        """Recovers interrupted writes. Names that are being written and a store that cannot be written to are skipped."""
        for name in interrupted_writes(self.root):
            if name.startswith("."):  # the removal of a checkpoint folder was interrupted
                name = name[1:].removesuffix(".checkpoints")
            with suppress(ImagicError), self.locked(name, timeout=0):  # the next writer of the name recovers it
                pass
