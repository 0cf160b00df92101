"""The process that runs the jobs of a store, one after another: ``python -m imagic_lora.web.worker STORE``. It alone imports torch."""

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
    """``worker.json``: the process that runs the jobs. A process of the same id that started at another time is another process."""

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


def read_worker(queue: Queue) -> WorkerFile | None:
    """Returns the worker of a queue that runs; None if there is none."""
    try:
        worker = WorkerFile.model_validate_json((queue.root / "worker.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return worker if worker.alive else None


def mark_crashed(queue: Queue, message: str) -> None:
    """Records that jobs which run have crashed; for a caller that knows that no worker runs and holds the lock of the queue."""
    for job in queue.jobs():
        if job.state == "running":
            queue.end_locked(job, "crashed", message=message)


def work(store: Path, idle: float = IDLE) -> int:
    """Runs jobs until none has come for a while, or until a job was interrupted.

    Args:
        store: folder of the store.
        idle: seconds without a job after which it returns.

    Returns:
        The exit code.
    """
    queue = Queue(store)
    queue.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(queue.root / "worker.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return 0  # another worker runs
    with lock:
        with queue.locked():
            mark_crashed(queue, "the worker ended without saying why")  # it holds the lock, so no other worker runs
            me = psutil.Process()
            write_text(queue.root / "worker.json", WorkerFile(pid=me.pid, started=me.create_time()).model_dump_json())
        last, kept = time.monotonic(), KeptEditor()
        while time.monotonic() - last < idle:
            job = queue.take()
            if job is None:
                time.sleep(_WAIT)
                continue
            if not run_job(queue, job, kept):
                return 130
            last = time.monotonic()
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(130)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _end)
    prepare_environment()
    sys.exit(work(Path(sys.argv[1])))
