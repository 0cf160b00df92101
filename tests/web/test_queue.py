"""The queue on disk and its worker: order, progress, stop and resume, SIGKILL of the server and of the worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagic_lora.adapters.durable import EventLog, write_text
from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicError
from imagic_lora.sampling.kept import KeptEditor
from imagic_lora.web import running
from imagic_lora.web.jobs import ENDED, Job, Queue
from imagic_lora.web.supervisor import Supervisor, resumable
from imagic_lora.web.worker import read_worker

FIT = {"settings": {"base": "critters", "embed": {"steps": 4}, "tune": {"steps": 4}, "memory": {"device": "cpu"}, "edit": {"steps": 2}}}


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "store")


def photo(queue: Queue) -> str:
    from PIL import Image

    (queue.root / "uploads").mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB").save(queue.root / "uploads" / "photo.png")
    return "uploads/photo.png"


def fit(queue: Queue, name: str = "rex", embed_steps: int = 4) -> Job:
    settings = FIT["settings"] | {"embed": {"steps": embed_steps}, "checkpoint": {"steps": 5}}
    return queue.submit("fit", {"image": photo(queue), "prompt": "a dog jumping", "name": name, "settings": settings})


def until(supervisor: Supervisor, condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, supervisor.queue.jobs()
        supervisor.check()
        time.sleep(0.05)


@pytest.fixture
def supervisor(queue: Queue):
    one = Supervisor(queue)
    yield one
    one.close()


def steps(queue: Queue, job: Job) -> list[dict]:
    return [event for event in queue.events(job.id).read()[0] if event["kind"] == "step"]


def test_jobs_run_in_their_order_which_can_be_changed(queue: Queue):
    first, second, third = (queue.submit("edit", {"name": name}) for name in "abc")
    queue.move(third.id, -2)
    queue.move(first.id, 5)
    assert [job.title for job in queue.waiting()] == ["c", "b", "a"]
    taken = queue.take("any")
    assert taken is not None
    assert taken.title == "c"
    assert taken.state == queue.read(third.id).state == "running"
    queue.move(third.id, 1)  # it no longer waits
    assert [job.title for job in queue.waiting()] == ["b", "a"]
    with pytest.raises(ImagicError, match="running"):
        queue.remove(third.id)
    queue.end(third.id, "cancelled")
    assert queue.end(third.id, "done").state == "cancelled"
    queue.remove(third.id)
    assert {job.id for job in queue.jobs()} == {first.id, second.id}


@pytest.mark.parametrize(
    "name", ["../../x", "1234567890-0123456789abcdef/..", "", "1234567890-0123456789abcdeF", "1234567890-0123456789abcdef\n"]
)
def test_ids_are_no_paths(queue: Queue, name: str):
    with pytest.raises(ImagicError, match="no job"):
        queue.read(name)


def test_a_job_that_cannot_be_read_says_why_and_hides_no_other(queue: Queue):
    broken, good = queue.submit("edit", {"name": "a"}), queue.submit("edit", {"name": "b"})
    (queue.folder(broken.id) / "job.json").write_text("{")
    listed = {job.id: job for job in queue.jobs()}
    assert listed[broken.id].kind == "unreadable"
    assert listed[broken.id].problem is not None
    assert [job.id for job in queue.waiting()] == [good.id]
    queue.remove(broken.id)
    assert [job.id for job in queue.jobs()] == [good.id]


def test_an_event_that_was_cut_is_none_and_hides_no_other(tmp_path: Path):
    log = EventLog(tmp_path / "events")
    log.append({"n": 1})
    events, offset = log.read()
    with log.path.open("ab") as file:
        file.write(b'{"n": 2')
    assert (events, log.read(offset)) == ([{"n": 1}], ([], offset))
    log.append({"n": 3})
    assert log.read(offset)[0] == [{"n": 3}]


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path / "a.json", "1")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ImagicError):
        write_text(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "1"


def test_the_server_side_does_not_import_torch():
    code = "import sys, imagic_lora.web.supervisor; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


def test_edits_and_sweeps_share_a_base_that_every_other_job_releases_first(queue: Queue, monkeypatch: pytest.MonkeyPatch):
    did: list[str] = []

    class Recorded(KeptEditor):
        @contextmanager
        def reused(self):
            did.append("reused")
            yield

        def release(self) -> None:
            did.append("released")

    monkeypatch.setattr(running, "command", lambda kind: lambda **arguments: (did.append(kind), print("{}")))
    for kind in ("edit", "sweep", "fit", "compare", "export", "compress"):
        queue.submit(kind, {"name": "rex"})
        job = queue.take("any")
        assert job is not None
        assert running.run_job(queue, job, Recorded())
        assert queue.read(job.id).state == "done"
    others = [one for kind in ("fit", "compare", "export", "compress") for one in ("released", kind)]
    assert did == ["reused", "edit", "reused", "sweep", *others]


@pytest.mark.web
def test_a_fit_an_edit_and_an_error_run_one_after_another(queue: Queue, supervisor: Supervisor):
    fitted = fit(queue)
    edited = queue.submit("edit", {"name": "rex", "eta": "0,0.7", "settings": {"steps": 2}})
    wrong = queue.submit("edit", {"name": "rex", "eta": "abc"})
    unknown = queue.submit("edit", {"name": "rex", "settings": {"stepps": 2}})
    until(supervisor, lambda: queue.read(unknown.id).state in ENDED)
    assert queue.read(fitted.id).state == "done", queue.read(fitted.id)
    reports = steps(queue, fitted)
    assert [(one["stage"], one["step"]) for one in reports][-1] == ("tune", 4)
    assert reports[-1]["left"] == 0
    assert Store(queue.store).names() == ["rex"]
    done = queue.read(edited.id)
    assert done.state == "done", done
    assert done.result is not None
    assert len(done.result["pictures"]) == 2
    assert (queue.folder(edited.id) / "out" / "eta0.7-seed0.png").is_file()
    failed = queue.read(wrong.id)
    assert failed.problem is not None
    assert failed.problem.got == "--eta abc"  # the message of the command line
    problem = queue.read(unknown.id).problem
    assert problem is not None
    assert "stepps" in problem.got


@pytest.mark.web
def test_a_fit_is_stopped_and_resumed_and_outlives_its_server_and_its_worker(queue: Queue, supervisor: Supervisor):
    """A fit goes on without a server, and the next server starts no second worker; after SIGKILL of the worker the next job runs in
    a new one. One story, since each worker needs seconds to start."""
    job, second = fit(queue, embed_steps=5000), fit(queue, "mia")
    code = (
        "import sys, time; from pathlib import Path; from imagic_lora.web.supervisor import *; s = Supervisor(Queue(Path(sys.argv[1])))\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code + "while True: s.check(); time.sleep(.05)", str(queue.store)])
    end = time.monotonic() + 300
    while not steps(queue, job):
        assert time.monotonic() < end
        time.sleep(0.05)
    server.kill()
    server.wait()
    worker, seen = read_worker(queue, "any"), len(steps(queue, job))
    assert worker is not None
    while len(steps(queue, job)) < seen + 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    supervisor.check()
    assert read_worker(queue, "any") == worker
    supervisor.stop(job.id)
    until(supervisor, lambda: queue.read(job.id).state in ENDED)
    assert queue.read(job.id).state == "stopped"
    assert "step" in queue.read(job.id).message
    assert resumable(queue, queue.read(job.id))

    resumed, waiting = supervisor.resume(job.id), queue.submit("edit", {"name": "none"})
    until(supervisor, lambda: queue.read(second.id).state in ENDED)
    assert queue.read(second.id).state == "done", queue.read(second.id)
    until(supervisor, lambda: bool(steps(queue, resumed)))
    first = steps(queue, resumed)[0]["step"]
    assert first > 1
    until(supervisor, lambda: steps(queue, resumed)[-1]["step"] > first + 5)  # past a checkpoint
    worker = read_worker(queue, "any")
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    until(supervisor, lambda: queue.read(resumed.id).state in ENDED)
    assert queue.read(resumed.id).state == "crashed"
    assert "SIGKILL" in queue.read(resumed.id).message
    assert resumable(queue, queue.read(resumed.id))

    until(supervisor, lambda: queue.read(waiting.id).state == "failed")  # the next job runs in a new worker
    third = supervisor.resume(resumed.id)
    until(supervisor, lambda: bool(steps(queue, third)))
    assert steps(queue, third)[0]["step"] > first
    supervisor.cancel(third.id)
    assert queue.read(third.id).state == "cancelled"
    assert read_worker(queue, "any") is None  # its memory is free
    assert Store(queue.store).unfinished() == []


def test_a_fit_whose_worker_died_without_a_server_is_found(queue: Queue, supervisor: Supervisor):
    job = fit(queue)
    queue.take("any")
    (queue.root / "worker-any.json").write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))  # the id is now another process
    supervisor.check()
    assert queue.read(job.id).state == "crashed"
    assert "no server" in queue.read(job.id).message
