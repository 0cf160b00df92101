"""Starts workers when jobs wait, stops and cancels their jobs, and explains how they ended. It runs in the server, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from ..adapters.atomic import remove
from ..adapters.store import Store
from ..core.errors import ImagicError
from .jobs import Job, Queue
from .places import ANYWHERE, Place
from .worker import mark_crashed, read_worker, workers

_END_SECONDS = 30  # a fit finishes its step and writes a checkpoint
_PROGRAM = (sys.executable, "-m", "imagic_lora.web.worker")


class Supervisor:
    """The workers of a queue, seen from the server: at most one for each place.

    Args:
        queue: the queue.
        places: where workers may run.
        program: the command of a worker, which gets the folder of the store and the place as arguments.
    """

    def __init__(self, queue: Queue, places: Sequence[Place] = (ANYWHERE,), program: Sequence[str] = _PROGRAM) -> None:
        self.queue = queue
        self.places = {place.id: place for place in places}
        self._program = program
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def check(self) -> None:
        """Records jobs whose worker has died, and starts workers for jobs that are ready. The server calls it regularly."""
        ended = {place: code for place, child in self._children.items() if (code := child.poll()) is not None}
        live = workers(self.queue) | (set(self._children) - set(ended))
        for job in self.queue.running():
            if job.worker not in live:
                with self.queue.locked():
                    if not read_worker(self.queue, job.worker):
                        mark_crashed(self.queue, job.worker, self._reason(job.worker, ended.get(job.worker)))
        for place in ended:
            del self._children[place]
        idle = len(live - {job.worker for job in self.queue.running()})
        wanted = sum(1 for _ in self.queue.ready()) - idle
        for place in self._free(live)[: max(0, wanted)]:
            self._start(place)

    @property
    def models(self) -> dict[str, Place]:
        """A place for each model of card, in the order of the cards."""
        found: dict[str, Place] = {}
        for place in self.places.values():
            found.setdefault(place.model, place)
        return found

    def name_of(self, job: Job) -> str:
        """Returns the card that a job runs on, for people; empty where there is no choice of one."""
        return self.places[job.worker].name if len(self.places) > 1 and job.worker in self.places else ""

    def _free(self, live: set[str]) -> list[Place]:
        """The places where a worker may start. One that may use any card, of a server that saw other cards than this one, runs alone."""
        if any((ANYWHERE.id in (one, other)) and one != other for one in live for other in self.places):
            return []
        return [place for name, place in self.places.items() if name not in live]

    def stop(self, job_id: str) -> None:
        """Asks a job that runs to stop: a fit finishes its step and saves a checkpoint, an edit keeps the images that are done."""
        with self.queue.locked():
            job = self.queue.read(job_id)
            worker = read_worker(self.queue, job.worker) if job.state == "running" else None
            if worker:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(worker.pid, signal.SIGINT)

    def cancel(self, job_id: str) -> None:
        """Ends a job at once. The process of one that runs is killed, which frees its memory; the checkpoints of its fit are deleted."""
        with self.queue.locked():
            job = self.queue.read(job_id)
            if job.state == "running":
                worker = read_worker(self.queue, job.worker)
                process = worker.process() if worker else None
                if process:
                    with suppress(psutil.Error):  # it has ended by itself
                        process.kill()
                        process.wait(_END_SECONDS)
                self.queue.end_locked(job, "cancelled", message="cancelled while it ran")
            else:
                self.queue.end_locked(job, "cancelled", message="cancelled before it ran")
                return
        self._discard(job)

    def resume(self, job_id: str) -> Job:
        """Adds a job that continues a fit which was stopped or has crashed, or repeats another job that did not end well.

        Raises:
            ImagicError: the job waits, runs or is done.
        """
        job = self.queue.read(job_id)
        if job.kind == "unreadable" or not repeatable(job):
            raise ImagicError(f"job {job_id} has the state {job.state}", "a job that did not end well", "start a new job")
        return self.queue.submit(job.kind, job.arguments | ({"resume": True} if resumable(self.queue, job) else {}))

    def close(self) -> None:
        """Ends the workers: their jobs stop as by :meth:`stop`. One that does not end in time is killed."""
        found = [read_worker(self.queue, place) for place in workers(self.queue)]
        processes = {process.pid: process for worker in found if worker and (process := worker.process())}
        for child in self._children.values():
            with suppress(psutil.Error):  # one that has just started is not found above
                processes.setdefault(child.pid, psutil.Process(child.pid))
        for process in processes.values():
            with suppress(psutil.Error):  # it has ended by itself
                process.terminate()
        end = time.monotonic() + _END_SECONDS
        for process in processes.values():
            with suppress(psutil.Error):  # it has ended by itself
                try:
                    process.wait(max(0.0, end - time.monotonic()))
                except psutil.TimeoutExpired:
                    process.kill()
        for child in self._children.values():
            child.wait()

    def _discard(self, job: Job) -> None:
        name = job.arguments.get("name")
        if job.kind == "fit" and isinstance(name, str):
            adapters = Store(self.queue.store)
            with adapters.locked(name, timeout=5):
                remove(adapters.checkpoints(name))

    def _start(self, place: Place) -> None:
        """Starts the worker of a place in a session of its own: Ctrl-C in the terminal of the server does not reach it."""
        command = [*self._program, str(self.queue.store), place.id]
        environment = os.environ | place.environment
        with self._log(place.id).open("wb") as log:
            self._children[place.id] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def _log(self, place: str) -> Path:
        return self.queue.root / f"worker-{place}.log"

    def _reason(self, place: str, code: int | None) -> str:
        """How the worker of a place ended, in words, with the end of what it printed."""
        if code is None:
            text = "the worker ended while no server was there"
        elif code < 0:
            name = signal.Signals(-code).name
            text = f"the worker was killed by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
        else:
            text = f"the worker ended with exit code {code}"
        with suppress(OSError):  # the exit code is the message without the log
            lines = self._log(place).read_text("utf-8", "replace")[-4000:].strip().splitlines()
            text += f": {' '.join(lines[-3:])[-600:]}" if lines and code is not None else ""
        return text


def repeatable(job: Job) -> bool:
    """Returns whether a job did not end well and can be run once more."""
    return job.state in ("stopped", "crashed", "failed", "cancelled") and job.kind != "unreadable"


def resumable(queue: Queue, job: Job) -> bool:
    """Returns whether a fit did not end well and has left checkpoints to continue from."""
    ended = job.kind == "fit" and job.state in ("stopped", "crashed", "failed")
    return ended and job.arguments.get("name") in Store(queue.store).unfinished()
