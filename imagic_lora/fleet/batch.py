"""A batch: what of a list is done, what is left, and the results of all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..adapters.adapter import Adapter
from ..adapters.durable import EventLog, write_bytes, write_text
from ..adapters.store import Store
from ..adapters.writing import check_outputs, writable
from ..core.errors import ImagicError
from .lists import ListError, Problem
from .outcome import Outcome, Update, digest, scores_of, stored
from .sheet import PAGE, has_thumbnails, write_page, write_thumbnails
from .table import Entry
from .work import Work, Worker, base_key

if TYPE_CHECKING:
    from ..bases.architecture import Architecture
    from ..core.config import RunConfig

RESULTS = "results.jsonl"
_LIST = "list.txt"
"""The path of the list that a folder of results belongs to."""
_LOCK_SECONDS = 0.5  # longer than another command needs to see that it is locked


@dataclass
class Batch:
    """The entries of a list, and what came of them so far.

    Args:
        path: the list.
        entries: its lines.
        work: what is done with every photo.

    Attributes:
        rows: the lines of ``results.jsonl`` by the name of the adapter.
    """

    path: Path
    entries: Sequence[Entry]
    work: Work
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def marker(self) -> Path:
        """The lock file of this list in the store, which every worker must see."""
        name = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]
        return self.work.store / f".batch-{name}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the list and the folder of the results while the context is open, and checks that both folders can be written to.

        Raises:
            ImagicError: another process works on the list or writes to the folder; the folder belongs to another list; a folder cannot be
                written to.
        """
        with ExitStack() as stack:
            for lock in (self.marker, self.work.out / ".lock"):
                check_outputs(lock.parent, [])
                held = FileLock(lock)
                with writable(lock.parent):
                    try:
                        held.acquire(timeout=_LOCK_SECONDS)
                    except Timeout as error:
                        got = f"another batch of {self.path} is running, or writes to {self.work.out}"
                        remedy = "wait until it is done, or choose another --out"
                        raise ImagicError(got, "one batch a list and a folder of results", remedy) from error
                stack.callback(_unlock, held, lock)
            check_outputs(self.work.out, [RESULTS, PAGE, _LIST])
            self._check_list()
            yield

    def _check_list(self) -> None:
        """Raises ImagicError if the folder of the results belongs to another list, whose results :meth:`begin` would replace.

        A list that is no longer there was moved or renamed.
        """
        try:
            other = Path(os.fsdecode((self.work.out / _LIST).read_bytes()))
        except FileNotFoundError:
            return
        if other != self.path.resolve() and other.exists():
            got = f"{self.work.out} holds the results of the list {other}"
            raise ImagicError(got, f"a folder for the results of {self.path}", "choose another --out, or delete that folder")

    def left(self, retry_failed: bool) -> list[Entry]:
        """Finds out what is done, and returns what is left, in the order of the list.

        Whether an adapter is done says the store: its prompt, its settings and the hash of its photo are those of the line. The results
        of earlier runs say what failed and which edits there are.

        Args:
            retry_failed: whether lines that failed and have not changed since are left.

        Raises:
            ListError: adapters of these names are others, and ``overwrite`` is False.
        """
        store, earlier, problems, left = Store(self.work.store), self._earlier(), list[Problem](), list[Entry]()
        for entry in self.entries:
            row = earlier.get(entry.name)
            row = row if row and row.get("asked") == digest(entry) else None
            try:
                adapter = stored(entry, store, same_photo=row is not None and row["state"] == "done")
            except (ImagicError, OSError) as error:
                if isinstance(error, ImagicError) and not self.work.overwrite:
                    problems.append(Problem([entry.place], error.got, "an unused name, or --overwrite"))
                left.append(entry)
                continue
            done = adapter is not None and self._edited(row, adapter)
            if done and adapter is not None:
                self.rows[entry.name] = row if row and row["state"] == "done" else _row_of(entry, adapter)
            elif row and row["state"] == "failed" and not retry_failed:
                self.rows[entry.name] = row
            else:
                left.append(entry)
        if problems:
            raise ListError(self.path, problems)
        return left

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """The last line of earlier results of every name."""
        log, offset, rows = EventLog(self.work.out / RESULTS), 0, dict[str, dict[str, Any]]()
        while True:
            events, after = log.read(offset)
            rows |= {row["name"]: row for row in events if isinstance(row.get("name"), str) and row.get("state") in ("done", "failed")}
            if after == offset:
                return rows
            offset = after

    def _edited(self, row: dict[str, Any] | None, adapter: Adapter) -> bool:
        """Whether the edits of an adapter that are asked for exist, as the results say."""
        asked = {(eta, seed) for eta in self.work.etas or (adapter.record.eta,) for seed in self.work.seeds}
        images = row["images"] if row else []
        there = {(one["eta"], one["seed"]) for one in images if Path(one["file"]).is_file()}
        return asked <= there

    def begin(self) -> None:
        """Writes the results so far, one line for each entry that is done or failed, and the thumbnails that a killed run did not."""
        for row in self.rows.values():
            with writable(self.work.out):
                if not has_thumbnails(self.work.out, row):
                    write_thumbnails(self.work.out, row)
        lines = "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in self.rows.values())
        write_text(self.work.out / RESULTS, lines)
        write_bytes(self.work.out / _LIST, os.fsencode(self.path.resolve()))

    def record(self, outcome: Outcome) -> None:
        """Appends an outcome to the results, and writes its thumbnails.

        Raises:
            DiskFull: the disk is full.
        """
        row = outcome.row()
        self.rows[outcome.entry.name] = row
        with writable(self.work.out):
            EventLog(self.work.out / RESULTS).append(row)
            write_thumbnails(self.work.out, row)

    def write_page(self) -> Path:
        """Writes the contact sheet of all entries, in the order of the list; returns its path."""
        return write_page(self.work.out, self.path.name, [self.rows.get(entry.name, _waiting(entry)) for entry in self.entries])

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The lines of the results that failed, in the order of the list."""
        return [row for entry in self.entries if (row := self.rows.get(entry.name)) and row["state"] == "failed"]


def grouped(entries: Iterable[Entry], together: int | None = 1) -> Iterator[list[Entry]]:
    """Returns the groups in which photos are fitted; those that share a base come one after another.

    A group shares each pass of the denoiser, see :func:`~imagic_lora.training.together.fit_together`: its photos have the same settings,
    but for the seed, and canvases of one size. Fits of mode full or of another method than imagic, and photos that cannot be read, are
    groups of their own.

    Args:
        entries: what is left of the list.
        together: most photos in a group; None for what the memory plan allows on this machine.
    """
    ranks: dict[tuple[Any, ...], int] = {}
    ordered = sorted(entries, key=lambda entry: ranks.setdefault(base_key(entry.config), len(ranks)))  # stable
    if together == 1:
        yield from ([entry] for entry in ordered)
        return
    same: dict[str, list[Entry]] = {}
    for entry in ordered:
        same.setdefault(entry.config.model_copy(update={"seed": 0}).model_dump_json(), []).append(entry)
    for alike in same.values():
        yield from _together(alike, together)


def _together(entries: Sequence[Entry], together: int | None) -> Iterator[list[Entry]]:
    """Groups of entries with the same settings."""
    from ..bases.loading.registry import architecture_of
    from ..training.grouping import groups

    config, by_name = entries[0].config, {entry.name: entry for entry in entries}
    if config.method != "imagic" or config.tune.mode == "full" or len(entries) == 1:
        yield from ([entry] for entry in entries)
        return
    architecture = architecture_of(config.base, config.revision)
    most = _planned(architecture, config, len(entries)) if together is None else together
    for group in groups([entry.item() for entry in entries], config, architecture, most):
        yield [by_name[item.name] for item in group]


def _planned(architecture: Architecture, config: RunConfig, photos: int) -> int:
    """The most photos of these settings that the memory plan allows together on this machine."""
    from ..core.runtime import free_memory, resolve_runtime
    from ..memory.out_of_memory import assumed_from
    from ..memory.presets import most_together

    runtime = resolve_runtime(config.memory)
    return most_together(architecture, config, assumed_from(runtime), free_memory(runtime.device), photos)


def run_here(groups: Iterable[Sequence[Entry]], work: Work, stop: Callable[[], bool]) -> Iterator[Update | Outcome]:
    """Works on groups in this process, one after another.

    Args:
        groups: from :func:`grouped`.
        work: what is done with every photo.
        stop: called after every step; True ends the work.

    Raises:
        Stopped: ``stop`` returned True; a checkpoint is saved.
        ImagicError: as :meth:`~imagic_lora.fleet.work.Worker.run`.
    """
    worker = Worker(work, stop)
    for group in groups:
        yield from worker.run(group)


def _unlock(held: FileLock, path: Path) -> None:
    with suppress(OSError):  # Windows does not delete an open file
        path.unlink()
    held.release()


def _row_of(entry: Entry, adapter: Adapter) -> dict[str, Any]:
    """The line of the results for an adapter that an earlier run stored without writing its line."""
    return Outcome(entry, adapter.folder, sum(adapter.record.seconds.values()), scores_of(adapter)).row()


def _waiting(entry: Entry) -> dict[str, Any]:
    """What the contact sheet shows of an entry that no run has come to yet."""
    return Outcome(entry).row() | {"state": "waiting"}
