"""A process that runs jobs of a store, one after another: ``python -m imagic_lora.web.worker STORE PLACE``. Workers alone import torch."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from ..adapters.durable import write_text
from ..core.environment import prepare_environment
from ..sampling.kept import KeptEditor
from .jobs import Queue
from .running import run_job

IDLE = 120.0  # seconds without a job after which the process ends and frees its memory, that of the kept base included
_WAIT = 0.2  # seconds between two looks at the queue


class WorkerFile(BaseModel):
    """``worker-PLACE.json``: the process that runs the jobs of a place.

    A process of the same id that started at another time is another process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started: float

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """Returns the process; None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.Error:
            pass
        return None


def read_worker(queue: Queue, place: str) -> WorkerFile | None:
    """Returns the worker of a place that runs; None if there is none."""
    try:
        worker = WorkerFile.model_validate_json((queue.root / f"worker-{place}.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return worker if worker.alive else None


def workers(queue: Queue) -> set[str]:
    """Returns the places of all workers that run, those that another server has started included."""
    found = (path.stem.removeprefix("worker-") for path in queue.root.glob("worker-*.json"))
    return {place for place in found if read_worker(queue, place)}


def mark_crashed(queue: Queue, place: str, message: str) -> None:
    """Records that the job of a place has crashed; for a caller that knows that no worker runs there and holds the lock of the queue."""
    for job in queue.running():
        if job.worker == place:
            queue.end_locked(job, "crashed", message=message)


def work(store: Path, place: str, idle: float = IDLE) -> int:
    """Runs jobs until none has come for a while, or until a job was interrupted.

    Args:
        store: folder of the store.
        place: the place of this worker; it has one worker at a time.
        idle: seconds without a job after which it returns.

    Returns:
        The exit code.
    """
    queue = Queue(store)
    queue.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(queue.root / f"worker-{place}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return 0  # another worker runs here
    with lock:
        with queue.locked():
            mark_crashed(queue, place, "the worker ended without saying why")  # it holds the lock, so no other worker runs here
            me = psutil.Process()
            write_text(queue.root / f"worker-{place}.json", WorkerFile(pid=me.pid, started=me.create_time()).model_dump_json())
        last, kept = time.monotonic(), KeptEditor()
        while time.monotonic() - last < idle:
            job = queue.take(place)
            if job is None:
                time.sleep(_WAIT)
                continue
            if not run_job(queue, job, kept):
                return 130
            last = time.monotonic()
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(130)


def main(store: str, place: str) -> None:
    """Runs the jobs of a store in this process, which it ends.

    Args:
        store: folder of the store.
        place: the place of this worker.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    prepare_environment()
    sys.exit(work(Path(store), place))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
