"""The queue: jobs in the folder ``.web`` of the store, one folder a job. Several processes share it; a lock orders their changes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from ..adapters.durable import EventLog, write_text
from ..adapters.store import folded
from ..adapters.writing import delete, writable
from ..core.errors import ImagicError

Kind = Literal["fit", "edit", "sweep", "compare", "export", "compress"]
State = Literal["queued", "running", "done", "failed", "crashed", "stopped", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "crashed", "stopped", "cancelled")
_ID = r"[0-9]{10}-[0-9a-f]{16}\Z"
_MAX_JOBS = 1000  # that wait; more are a mistake or an attack


class Problem(BaseModel):
    """An error as the command line prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    got: str
    expected: str
    remedy: str

    @classmethod
    def of(cls, error: ImagicError) -> Problem:
        """The same as an exception."""
        return cls(got=error.got, expected=error.expected, remedy=error.remedy)

    def error(self) -> ImagicError:
        """The exception."""
        return ImagicError(self.got, self.expected, self.remedy)


class Job(BaseModel):
    """One command that the worker runs.

    Args:
        id: name of its folder; ids sort by their time.
        kind: the command.
        arguments: what the function of the command is called with; paths are relative to the folder of the queue.
        state: ``crashed``: the worker ended within the job. ``stopped``: on request, or with the server; a fit can be resumed.
        place: jobs that wait run in ascending order of it.
        created, started, ended: seconds since the epoch.
        worker: the place of the worker that runs or has run it; empty for a job that waits.
        result: the JSON of the command.
        problem: why it failed.
        message: what was saved when it stopped, or how the worker ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: Kind | Literal["unreadable"]
    arguments: dict[str, Any]
    state: State = "queued"
    place: float
    created: float
    started: float | None = None
    ended: float | None = None
    worker: str = ""
    result: dict[str, Any] | None = None
    problem: Problem | None = None
    message: str = ""

    @property
    def title(self) -> str:
        """What the job works on, for people."""
        return str(self.arguments.get("name") or self.arguments.get("adapter") or self.arguments.get("prompt") or "")

    @property
    def adapters(self) -> tuple[set[str], set[str]]:
        """The adapters that the job reads, and those that it writes, as file systems compare names that ignore case."""
        given = self.arguments
        name, source = folded(str(given.get("name") or "")), folded(str(given.get("adapter") or ""))
        if self.kind == "compress":
            return {source}, {name or folded(f"{source}-r{given.get('rank')}")}
        writes = self.kind == "fit" or (self.kind == "sweep" and bool(given.get("store_eta")))
        named = {name} if name else set[str]()
        return (set(), named) if writes else (named, set())


class Queue:
    """The jobs of a store.

    Args:
        store: folder of the store; the queue is in its subfolder ``.web``.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.root = store / ".web"
        self._known: dict[str, tuple[tuple[int, int], Job]] = {}  # by id: the state of its file when it was read, and the job

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time change jobs. The system releases the lock of a dead process."""
        with writable(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "queue.lock", timeout=30)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def folder(self, job_id: str) -> Path:
        """Returns the folder of a job.

        Raises:
            ImagicError: the id is none.
        """
        if not re.match(_ID, job_id):
            raise ImagicError(f"no job {job_id[:80]!r}", "the id of a job", "reload the page")
        return self.root / "jobs" / job_id

    def events(self, job_id: str) -> EventLog:
        """Returns the events of a job."""
        return EventLog(self.folder(job_id) / "events.jsonl")

    def submit(self, kind: Kind, arguments: dict[str, Any]) -> Job:
        """Adds a job at the end of the queue.

        Raises:
            ImagicError: too many jobs wait, or the disk cannot be written to.
        """
        with self.locked():
            waiting = self.waiting()
            if len(waiting) >= _MAX_JOBS:
                raise ImagicError(f"{len(waiting)} jobs wait", f"at most {_MAX_JOBS}", "cancel some, or wait")
            now = time.time()
            place = max([now, *(job.place + 1 for job in waiting)])
            job = Job(id=f"{int(now):010d}-{secrets.token_hex(8)}", kind=kind, arguments=arguments, place=place, created=now)
            with writable(self.root):
                self.folder(job.id).mkdir(parents=True)
            self.save(job)
        return job

    def read(self, job_id: str) -> Job:
        """Reads a job.

        Raises:
            ImagicError: there is no such job, or its file is not one that was written here.
        """
        path = self.folder(job_id) / "job.json"
        try:
            job = Job.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ImagicError(f"no job {job_id}", "the id of a job", "reload the page") from None
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ImagicError(f"{path} cannot be read ({reason})", "the file of a job", "delete its folder") from error
        if job.id != job_id:
            raise ImagicError(f"{path} holds job {job.id[:80]!r}", f"job {job_id}", "delete its folder")
        return job

    def save(self, job: Job) -> None:
        """Writes a job; the caller holds the lock."""
        write_text(self.folder(job.id) / "job.json", job.model_dump_json(indent=1))

    def jobs(self) -> list[Job]:
        """Returns all jobs, the oldest first. One whose file cannot be read has the kind ``unreadable`` and says why."""
        try:
            names = sorted(path.name for path in (self.root / "jobs").iterdir() if re.match(_ID, path.name))
        except FileNotFoundError:
            return []
        return [job for name in names if (job := self._listed(name))]

    def waiting(self) -> list[Job]:
        """Returns the jobs that wait, in the order in which they will run."""
        return _waiting(self.jobs())

    def running(self) -> list[Job]:
        """Returns the jobs that run: at most one for each worker."""
        return [job for job in self.jobs() if job.state == "running"]

    def ready(self) -> Iterator[Job]:
        """Yields the jobs that wait and may all run at once, beside those that run, in their order.

        A job that writes an adapter runs beside no other job of that adapter, and the jobs of an adapter keep their order: an edit waits
        for the fit before it.
        """
        read, written, jobs = set[str](), set[str](), self.jobs()
        for job in (*(job for job in jobs if job.state == "running"), *_waiting(jobs)):
            reads, writes = job.adapters
            if job.state == "queued" and not (writes & (read | written) or reads & written):
                yield job
            read |= reads
            written |= writes

    def take(self, worker: str) -> Job | None:
        """Marks the next job that is ready as running, and returns it; None if there is none. Only a worker calls it.

        Args:
            worker: its place.
        """
        with self.locked():
            for job in self.ready():
                taken = job.model_copy(update={"state": "running", "started": time.time(), "worker": worker})
                self.save(taken)
                return taken
        return None

    def end(self, job_id: str, state: State, **facts: Any) -> Job:
        """Records how a job that runs ended. One that has ended already, for example cancelled, stays as it is."""
        with self.locked():
            return self.end_locked(self.read(job_id), state, **facts)

    def end_locked(self, job: Job, state: State, **facts: Any) -> Job:
        """As :meth:`end`, for a caller that holds the lock."""
        if job.state in ENDED:
            return job
        ended = job.model_copy(update={"state": state, "ended": time.time(), **facts})
        self.save(ended)
        return ended

    def move(self, job_id: str, by: int) -> None:
        """Moves a job that waits by a number of places, towards the front if negative. One that no longer waits is not moved."""
        with self.locked():
            order = self.waiting()
            index = next((k for k, job in enumerate(order) if job.id == job_id), None)
            if index is None:
                return
            order.insert(max(0, min(len(order) - 1, index + by)), order.pop(index))
            places = sorted(job.place for job in order)
            for job, place in zip(order, places, strict=True):
                if job.place != place:
                    self.save(job.model_copy(update={"place": place}))

    def remove(self, job_id: str) -> None:
        """Deletes a job that has ended, with its images.

        Raises:
            ImagicError: it waits or runs.
        """
        with self.locked():
            job = self._listed(job_id)
            if job and job.state not in ENDED:
                raise ImagicError(f"job {job_id} has the state {job.state}", "a job that has ended", "cancel it first")
            with writable(self.root):
                delete(self.folder(job_id))

    def _listed(self, name: str) -> Job | None:
        """A job of :meth:`jobs`; None if it was deleted meanwhile. It is read again only if its file was replaced."""
        try:
            facts = (self.folder(name) / "job.json").stat()
            state = (facts.st_mtime_ns, facts.st_ino)
            known = self._known.get(name)
            if known is None or known[0] != state:
                known = self._known[name] = (state, self.read(name))
            return known[1]
        except FileNotFoundError:
            return None  # deleted, or the server was killed before it wrote the job
        except ImagicError as error:
            if not (self.folder(name) / "job.json").exists():
                return None
            created = float(name.split("-")[0])
            return Job(id=name, kind="unreadable", arguments={}, state="failed", place=created, created=created, problem=Problem.of(error))


def _waiting(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that wait among some, in the order in which they will run."""
    return sorted((job for job in jobs if job.state == "queued"), key=lambda job: (job.place, job.id))
