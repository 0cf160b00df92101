"""One worker for each card, with simulated cards and jobs that only wait: who runs where, beside what, and what survives."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from common import each
from conftest import Server, watched

from imagic_lora.core.machine import Card
from imagic_lora.web import places as module
from imagic_lora.web import planning
from imagic_lora.web.jobs import ENDED, Job, Queue
from imagic_lora.web.places import ANYWHERE, Place, places
from imagic_lora.web.planning import planned
from imagic_lora.web.supervisor import Supervisor
from imagic_lora.web.worker import read_worker, workers

TWO = [Place(f"GPU-{k}", f"card {k}", "A", {"CUDA_VISIBLE_DEVICES": f"GPU-{k}"}) for k in range(2)]
STUB = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "store")


@pytest.fixture
def supervisor(queue: Queue) -> Iterator[Supervisor]:
    one = Supervisor(queue, TWO, STUB)
    yield one
    one.close()


def until(supervisor: Supervisor, condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, supervisor.queue.jobs()
        supervisor.check()
        time.sleep(0.02)


def running(queue: Queue) -> dict[str, str]:
    """The places of the jobs that run, by title."""
    return {job.title: job.worker for job in queue.running()}


def go(queue: Queue, *names: str) -> None:
    """Lets jobs end."""
    for name in names:
        (queue.root / f"go-{name}").touch()


def state(queue: Queue, job: Job) -> str:
    return queue.read(job.id).state


@each(
    "cards, expected",
    [
        ([], [ANYWHERE]),
        ([("GPU-5a/1", "A")], [Place("GPU-5a-1", "card 0, A", "A")]),
        (
            [("GPU-5a", "A"), ("GPU-7e", "B")],
            [
                Place("GPU-5a", "card 0, A", "A", {"CUDA_VISIBLE_DEVICES": "GPU-5a"}),
                Place("GPU-7e", "card 1, B", "B", {"CUDA_VISIBLE_DEVICES": "GPU-7e"}),
            ],
        ),
    ],
)
def test_a_card_is_a_place(monkeypatch: pytest.MonkeyPatch, cards: list[tuple[str, str]], expected: list[Place]) -> None:
    """A single one keeps the environment as it is: it is the one that PyTorch takes."""
    found = [(Card(k, name, 0, True), {"CUDA_VISIBLE_DEVICES": uuid}) for k, (uuid, name) in enumerate(cards)]
    monkeypatch.setattr(module, "visible_cards", lambda: found)
    assert places() == expected


FIT, EDIT = ("fit", {"name": "rex"}), ("edit", {"name": "rex"})


@each(
    "first, second, together",
    {
        "two fits of a name": (FIT, FIT, False),
        "names that a file system may not tell apart": (FIT, ("fit", {"name": "REX."}), False),
        "fits of two names": (FIT, ("fit", {"name": "mia"}), True),
        "a fit, then an edit": (FIT, EDIT, False),
        "an edit, then a fit": (EDIT, FIT, False),
        "two edits": (EDIT, EDIT, True),
        "a sweep that stores eta": (("sweep", {"name": "rex", "store_eta": True}), EDIT, False),
        "a sweep": (("sweep", {"name": "rex", "store_eta": False}), EDIT, True),
        "compressing what is fitted": (FIT, ("compress", {"adapter": "rex", "rank": 4}), False),
        "using what is compressed": (("compress", {"adapter": "rex", "rank": 4}), ("export", {"name": "rex-r4"}), False),
        "compressing, and editing the source": (("compress", {"adapter": "rex", "rank": 4}), EDIT, True),
        "comparisons": (("compare", {"prompt": "a"}), ("compare", {"prompt": "a"}), True),
    },
)
def test_jobs_that_write_an_adapter_run_beside_no_other_job_of_it(tmp_path: Path, first: Any, second: Any, together: bool) -> None:
    queue = Queue(tmp_path)
    one, two = queue.submit(*first), queue.submit(*second)
    assert [job.id for job in queue.ready()] == ([one.id, two.id] if together else [one.id])
    taken = queue.take("a")
    assert taken is not None
    assert taken.id == one.id
    other = queue.take("b")
    assert (other is not None) == together
    queue.end(one.id, "done")
    assert together or [job.id for job in queue.ready()] == [two.id]


def test_a_job_that_is_held_back_is_overtaken_by_others_but_not_by_its_own_kind(queue: Queue) -> None:
    """Moved jobs keep to it: what is first in the queue comes first for an adapter."""
    jobs = [queue.submit("fit", {"name": name, "overwrite": k > 0}) for k, name in enumerate(("rex", "rex", "mia", "rex"))]
    assert queue.take("a") == queue.read(jobs[0].id)
    assert [job.id for job in queue.ready()] == [jobs[2].id]
    queue.move(jobs[3].id, -2)
    assert [job.id for job in queue.ready()] == [jobs[2].id]
    queue.end(jobs[0].id, "done")
    assert [job.id for job in queue.ready()] == [jobs[3].id, jobs[2].id]


@pytest.mark.web
def test_each_card_runs_one_job_at_a_time(queue: Queue, supervisor: Supervisor) -> None:
    """Two servers that look at one queue start no more than that; every worker sees its own card alone."""
    jobs = [queue.submit("edit", {"name": f"n{k}"}) for k in range(6)]
    queue.move(jobs[5].id, -5)
    other = Supervisor(queue, TWO, STUB)
    until(supervisor, lambda: (other.check(), len(running(queue)) == 2)[1])
    assert running(queue).keys() == {"n5", "n0"}
    assert set(running(queue).values()) == workers(queue) == {"GPU-0", "GPU-1"}
    go(queue, *(f"n{k}" for k in range(6)))
    until(supervisor, lambda: (other.check(), all(state(queue, job) in ENDED for job in jobs))[1])
    results = [queue.read(job.id).result for job in jobs]
    assert all(result and result["visible"] == result["place"] for result in results), results
    for place in TWO:
        times = sorted((result["began"], result["ended"]) for result in results if result and result["place"] == place.id)
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(times)), times
    other.close()


@pytest.mark.web
def test_what_ends_on_one_card_leaves_the_other(queue: Queue, supervisor: Supervisor) -> None:
    """Stop, Cancel and SIGKILL; the freed card takes what waits; a name is not fitted twice at once."""
    names = ("rex", "mia", "rex", "leo", "zoe")
    rex, mia, again, leo, zoe = (queue.submit("fit", {"name": name}) for name in names)
    until(supervisor, lambda: len(running(queue)) == 2)
    assert running(queue).keys() == {"rex", "mia"}
    until(supervisor, lambda: (queue.root / "began-mia").exists())
    supervisor.cancel(mia.id)
    assert state(queue, mia) == "cancelled"
    until(supervisor, lambda: running(queue).keys() == {"rex", "leo"})  # leo overtakes the second fit of rex
    assert running(queue)["leo"] == queue.read(mia.id).worker
    worker = read_worker(queue, running(queue)["rex"])
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    until(supervisor, lambda: state(queue, rex) == "crashed")
    assert "SIGKILL" in queue.read(rex.id).message
    assert state(queue, leo) == "running"
    until(supervisor, lambda: state(queue, again) == "running")
    until(supervisor, lambda: (queue.root / "began-leo").exists())
    supervisor.stop(leo.id)
    until(supervisor, lambda: state(queue, leo) == "stopped")
    assert state(queue, again) == "running"
    go(queue, "rex", "zoe")
    until(supervisor, lambda: {state(queue, again), state(queue, zoe)} == {"done"})


@pytest.mark.web
def test_a_server_that_starts_again_finds_every_worker(queue: Queue, supervisor: Supervisor) -> None:
    """Also one that sees other cards: what may use any card does not start beside a worker that has one."""
    jobs = [queue.submit("edit", {"name": name}) for name in ("a", "b", "c")]
    until(supervisor, lambda: len(running(queue)) == 2)
    before = {place: read_worker(queue, place) for place in workers(queue)}
    again, without = Supervisor(queue, TWO, STUB), Supervisor(queue, [ANYWHERE], STUB)
    for one in (again, without):
        one.check()
        assert not one._children
    assert {place: read_worker(queue, place) for place in workers(queue)} == before
    assert [state(queue, job) for job in jobs] == ["running", "running", "queued"]
    for worker in before.values():
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
    for child in supervisor._children.values():
        child.wait()
    until(again, lambda: state(queue, jobs[2]) == "running")
    until(again, lambda: (queue.root / "began-c").exists())
    assert [queue.read(job.id).message for job in jobs[:2]] == ["the worker ended while no server was there"] * 2
    again.close()
    assert state(queue, jobs[2]) == "stopped"
    assert not workers(queue)


def test_cards_of_one_model_have_one_plan(queue: Queue) -> None:
    """In the order of the cards, each with what shows it that card alone."""
    cards = [Place("c", "card 0", "B", {"CUDA_VISIBLE_DEVICES": "c"}), *TWO]
    assert Supervisor(queue, cards, STUB).models == {"B": cards[0], "A": cards[1]}


def test_a_plan_is_made_for_its_card_and_kept_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is not kept."""
    seen: list[str] = []

    async def started(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        if len(seen) == 1:
            raise FileNotFoundError

        async def communicate() -> tuple[bytes, bytes]:
            return b'{"preset": "cpu"}', b""

        return SimpleNamespace(communicate=communicate)

    async def asked() -> None:
        with pytest.raises(FileNotFoundError):
            await planned({}, {"CUDA_VISIBLE_DEVICES": "c"})
        for card in "cdc":
            assert await planned({}, {"CUDA_VISIBLE_DEVICES": card}) == {"preset": "cpu"}
        monkeypatch.setattr(planning, "_FRESH", -1)
        await planned({}, {"CUDA_VISIBLE_DEVICES": "c"})

    monkeypatch.setattr(planning, "_plans", {})
    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)
    asyncio.run(asked())
    assert seen == ["c", "c", "d", "c"]


@pytest.mark.web
def test_a_fit_is_planned_on_each_model_of_card(browser: Any, tmp_path: Path) -> None:
    """On a server with two simulated cards of different models."""
    code = "from imagic_lora.web import places, studio; places = [places.Place(name, name, f'Model {name}') for name in 'AB']"
    before = f"{code}; studio.places = lambda: places"
    with closing(Server(tmp_path, before=before)) as server, watched(browser, server, 60_000) as page:
        page.goto(server.url)
        plan = page.get_by_role("status", name="Memory plan").filter(visible=True)
        for name in ("A", "B"):
            plan.get_by_text(f"Predicted peak on Model {name}: 0.").wait_for()
            assert plan.get_by_label(f"Memory of tune on Model {name}").count() == 1
