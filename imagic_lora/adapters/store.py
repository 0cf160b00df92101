"""A folder of adapters: one folder each, whole or not there at all, one writer a name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..core.errors import ImagicError
from .adapter import Adapter
from .atomic import AtomicWriter, atomic_folder, changed_file, interrupted_writes, read_manifest, recover, remove, writable
from .record import NAME, RECORD, Record

_MENDING = 0.5  # seconds, more than it takes to undo what a writer that was cut off has left


def _write_pid(handle: int) -> None:
    """Leaves the number of this process in a lock's file, if there is room for it."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())


def _lock_owner(path: Path) -> str:
    try:
        number = int(path.read_text())
        return f"process {number}" if psutil.pid_exists(number) else "another process"  # which has not signed yet
    except (OSError, ValueError, OverflowError):
        return "another process"


def check_name(name: str) -> str:
    """The name, if it can be one.

    Raises:
        ImagicError: it holds a path, begins with a dot, or is empty or over 100 characters.
    """
    if not re.match(NAME, name):
        raise ImagicError(f"{name!r} as a name", "letters, digits, '.', '_' and '-', at most 100, no path", "choose another name")
    return name


class Store:
    """A folder of adapters, and of what unfinished fits have saved so far.

    Args:
        root: made when the first adapter is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: str | None = None

    @contextmanager
    def locked(self, name: str, patience: float = _MENDING) -> Iterator[Store]:
        """The right to write a name, which nobody else has meanwhile; what a writer that was cut off has left is undone first.

        What it gives is the store for whoever has the name: only through that one it can be written, removed or claimed again.

        Args:
            patience: seconds to wait for whoever has it, who may only be looking.

        Raises:
            ImagicError: another process has it, or another writer of this one, or the folder cannot be written to.
        """
        if check_name(name) == self._held:
            yield self
            return
        path = self.root / f".{name}.lock"
        # The system lets go of a dead process's; a fit may be begun in one thread and closed in another.
        lock = FileLock(path, thread_local=False, on_acquired=_write_pid)
        with writable(self.root):
            try:
                lock.acquire(timeout=patience, poll_interval=0.02)
            except Timeout as error:
                got = f"{self.root / name} is being written by {_lock_owner(path)}"
                raise ImagicError(got, "one writer for a name", "wait until it is done, or choose another --name") from error
        holder = Store(self.root)
        try:
            for folder in (self.root / name, self.checkpoints(name)):
                recover(folder)
            holder._held = name
            yield holder
        finally:
            holder._held = None
            with suppress(OSError):  # not on Windows
                path.unlink()  # whoever has it open already sees that it has no name any more
            lock.release()

    def check_free(self, name: str, overwrite: bool) -> None:
        """Makes sure, before anything is trained, that an adapter of this name can be written.

        Raises:
            ImagicError: it cannot be a name, it is taken and ``overwrite`` is not given, or the folder cannot be written to.
        """
        with self.locked(name):
            if (self.root / name).exists() and not overwrite:
                raise ImagicError(f"{self.root / name} exists", "a new name", "choose another --name, or --overwrite")

    def names(self) -> list[str]:
        """Names of the adapters, sorted."""
        self._recover_all()
        return sorted(path.parent.name for path in self.root.glob(f"[!.]*/{RECORD}") if re.match(NAME, path.parent.name))

    def read(self, name: str, verify: bool = True) -> Adapter:
        """An adapter whose files are all there and unchanged.

        Args:
            verify: False reads the record alone, which is enough to tell of an adapter, but not to use it.

        Raises:
            ImagicError: no such adapter, a record that is not of this version, or a file that is missing or has changed.
        """
        folder = self.root / check_name(name)
        if not (folder / RECORD).is_file():
            there = ", ".join(self.names()) or "none"
            if not (folder / RECORD).is_file():  # unless looking has put it back
                raise ImagicError(f"no adapter {name!r} in {self.root}", f"one of its adapters ({there})", "see imagic-lora list")
        adapter = Adapter(folder, read_manifest(folder, RECORD, Record))
        if verify and (path := changed_file(folder, adapter.record)):
            raise ImagicError(f"{path} is missing or has changed", "the file as it was written", "fit or copy the adapter again")
        return adapter

    def write(self, record: Record, fill: Callable[[AtomicWriter], None], overwrite: bool = False) -> Adapter:
        """Writes an adapter, whole or not at all; the one that it replaces goes last.

        Args:
            record: without its ``files``.
            fill: writes every other file.

        Raises:
            ImagicError: as :meth:`check_free`; the disk is full; something is not finite.
        """
        with self.locked(record.name) as held:
            held.check_free(record.name, overwrite)
            with atomic_folder(self.root / record.name) as made:
                fill(made)
                made.write_manifest(RECORD, record)
        return self.read(record.name)

    def remove(self, name: str) -> None:
        """Removes an adapter, and what an unfinished fit of that name has saved.

        Raises:
            ImagicError: neither is there, or it is being written.
        """
        final = self.root / check_name(name)
        if not final.exists() and not self.checkpoints(name).exists():
            self.read(name)
        with self.locked(name), writable(self.root):
            for folder in (final, self.checkpoints(name)):
                remove(folder)

    def checkpoints(self, name: str) -> Path:
        """Where a fit of that name saves what it has come to."""
        return self.root / f".{check_name(name)}.checkpoints"

    def unfinished(self) -> list[str]:
        """Names whose fit was cut off, or is still at work."""
        return sorted({path.parent.name[1:].removesuffix(".checkpoints") for path in self.root.glob(".*.checkpoints/[!.]*")})

    def _recover_all(self) -> None:
        """Undoes what writers that were cut off have left; those still at work, and a folder that cannot be written to, are let be."""
        for name in interrupted_writes(self.root):
            if name.startswith("."):  # what was removed are checkpoints
                name = name[1:].removesuffix(".checkpoints")
            with suppress(ImagicError), self.locked(name, patience=0):
                pass
