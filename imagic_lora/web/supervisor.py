"""Starts the worker when jobs wait, stops and cancels its job, and explains how it ended. It runs in the server and never imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from ..adapters.atomic import remove
from ..adapters.store import Store
from ..core.errors import ImagicError
from .jobs import Job, Queue
from .worker import mark_crashed, read_worker

_END_SECONDS = 30  # a fit finishes its step and writes a checkpoint


class Supervisor:
    """The worker of a queue, seen from the server.

    Args:
        queue: the queue.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._child: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Starts a worker if jobs wait and none runs, and records a job whose worker has died. The server calls it regularly."""
        ended = self._child.poll() if self._child else None
        if (self._child and ended is None) or read_worker(self.queue):
            return
        if self.queue.running():
            with self.queue.locked():
                if not read_worker(self.queue):
                    mark_crashed(self.queue, self._reason(ended))
        self._child = None
        if self.queue.waiting():
            self._start()

    def stop(self, job_id: str) -> None:
        """Asks the job that runs to stop: a fit finishes its step and saves a checkpoint, an edit keeps the images that are done."""
        self._signal(job_id, signal.SIGINT)

    def cancel(self, job_id: str) -> None:
        """Ends a job at once. The process of one that runs is killed, which frees its memory; the checkpoints of its fit are deleted."""
        with self.queue.locked():
            job = self.queue.read(job_id)
            if job.state == "running":
                worker = read_worker(self.queue)
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
        """Ends the worker: its job stops as by :meth:`stop`. One that does not end in time is killed."""
        worker = read_worker(self.queue)
        if worker and (process := worker.process()):
            with suppress(psutil.Error):  # it has ended by itself
                process.terminate()
                try:
                    process.wait(_END_SECONDS)
                except psutil.TimeoutExpired:
                    process.kill()
        if self._child:
            self._child.wait()

    def _signal(self, job_id: str, number: signal.Signals) -> None:
        """Sends a signal to the worker while it runs this job, and to no other process."""
        with self.queue.locked():
            worker = read_worker(self.queue)
            if self.queue.read(job_id).state == "running" and worker:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(worker.pid, number)

    def _discard(self, job: Job) -> None:
        name = job.arguments.get("name")
        if job.kind == "fit" and isinstance(name, str):
            adapters = Store(self.queue.store)
            with adapters.locked(name, timeout=5):
                remove(adapters.checkpoints(name))

    def _start(self) -> None:
        """Starts the worker in a session of its own: Ctrl-C in the terminal of the server does not reach it."""
        command = [sys.executable, "-m", "imagic_lora.web.worker", str(self.queue.store)]
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    @property
    def _log(self) -> Path:
        return self.queue.root / "worker.log"

    def _reason(self, code: int | None) -> str:
        """How the worker ended, in words, with the end of what it printed."""
        if code is None:
            text = "the worker ended while no server was there"
        elif code < 0:
            name = signal.Signals(-code).name
            text = f"the worker was killed by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
        else:
            text = f"the worker ended with exit code {code}"
        with suppress(OSError):  # the exit code is the message without the log
            lines = self._log.read_text("utf-8", "replace")[-4000:].strip().splitlines()
            text += f": {' '.join(lines[-3:])[-600:]}" if lines and code is not None else ""
        return text


def repeatable(job: Job) -> bool:
    """Returns whether a job did not end well and can be run once more."""
    return job.state in ("stopped", "crashed", "failed", "cancelled") and job.kind != "unreadable"


def resumable(queue: Queue, job: Job) -> bool:
    """Returns whether a fit did not end well and has left checkpoints to continue from."""
    ended = job.kind == "fit" and job.state in ("stopped", "crashed", "failed")
    return ended and job.arguments.get("name") in Store(queue.store).unfinished()
