"""Batches on a local Ray: the adapters of a batch without it, byte for byte; workers and drivers that are killed; what is refused."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from batches import TINY, Batch, contents

from imagic_lora.core.errors import DiskFull, ImagicError, Stopped
from imagic_lora.fleet.on_ray import RETRIES, Cluster, RayRun, actor_resources
from imagic_lora.fleet.outcome import Outcome, Update

ROOT = Path(__file__).parents[2]
PATIENCE = 400


@pytest.fixture
def command(photos: Path, folder: Path, tmp_path: Path) -> list[str]:
    """The command line of a batch of three photos, with a checkpoint after every step."""
    others = [token for token in TINY if token not in ("--embed.steps", "--tune.steps", 3)]
    tokens = [sys.executable, "-m", "imagic_lora", "batch", photos, "--base", folder, *others, "--checkpoint.steps", 1]
    return [str(token) for token in tokens]


def start(command: Sequence[str], folder: Path, *tokens: object) -> subprocess.Popen[str]:
    """Starts a command in a folder, with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen([*command, *map(str, tokens)], cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The results."""
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


def until(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Waits until a file of this pattern exists."""
    end = time.monotonic() + PATIENCE
    while not list(folder.glob(pattern)):
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < end, (folder / "log.txt").read_text()
        time.sleep(0.005)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the actors."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::ImagicLoraWorker"):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_ray_gives_the_same_adapters_though_a_worker_is_killed_in_every_phase(command: list[str], tmp_path: Path) -> None:
    """Load, encode, embed, tune: the worker is replaced, and its photo goes on from its checkpoint."""
    pytest.importorskip("ray")
    steps = ("--embed.steps", 60, "--tune.steps", 60)
    alone = start(command, tmp_path, "--store", "alone", "--out", "alone-out", *steps)
    assert alone.wait(PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    process = start(command, tmp_path, *steps, "--out", "out", "--ray", "local", "--workers", 1)
    for pattern in ("", "adapters/.p0.checkpoints/embed-0000*", "adapters/.p1.checkpoints/tune-0000*", "adapters/.p2.lock"):
        if pattern:
            until(tmp_path, pattern, process)
        end = time.monotonic() + PATIENCE
        while not (found := workers(process)):
            assert process.poll() is None
            assert time.monotonic() < end, (tmp_path / "log.txt").read_text()
            time.sleep(0.05)
        found[0].kill()
    assert process.wait(PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    assert contents(tmp_path / "adapters") == contents(tmp_path / "alone")
    assert sorted(row["name"] for row in rows(tmp_path)) == ["p0", "p1", "p2"]


@pytest.mark.slow
def test_a_driver_of_ray_is_interrupted_killed_and_started_again(command: list[str], tmp_path: Path) -> None:
    """After SIGINT the workers save checkpoints, and the exit code is 130; after SIGKILL the workers end with their driver."""
    pytest.importorskip("ray")
    steps = ("--embed.steps", 60, "--tune.steps", 60, "--out", "out", "--ray", "local", "--workers", 1)
    process = start(command, tmp_path, *steps)
    until(tmp_path, "adapters/.p0.checkpoints/embed-*", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, (tmp_path / "log.txt").read_text()
    assert list(tmp_path.glob("adapters/.p0.checkpoints/*"))
    process = start(command, tmp_path, *steps)
    until(tmp_path, "adapters/.p0.checkpoints/tune-*", process)
    of_driver = workers(process)
    process.kill()
    process.wait()
    assert of_driver
    assert not psutil.wait_procs(of_driver, timeout=60)[1]
    assert start(command, tmp_path, *steps[:6]).wait(PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    assert sorted(row["name"] for row in rows(tmp_path)) == ["p0", "p1", "p2"]


def test_flags_of_ray_without_it_are_refused(batch: Batch) -> None:
    for tokens in (("--workers", 2), ("--gpus-per-worker", 0.5), ("--max-in-flight", 1)):
        code, _, said = batch(*tokens)
        assert code == 2
        assert f"{tokens[0]} without --ray" in said
    for tokens in (("--workers", 0), ("--gpus-per-worker", -1), ("--gpus-per-worker", 1.5), ("--max-in-flight", 0)):
        assert batch("--ray", "local", *tokens)[0] == 2


def test_without_ray_the_extra_is_named(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, said = batch("--ray", "local")
    assert code == 2
    assert "imagic-lora[ray]" in said
    assert batch()[0] == 0
    assert batch("--ray", "local")[0] == 0  # nothing is left, so that nothing is started


@pytest.mark.parametrize(
    ("there", "cluster", "expected"),
    [
        ({"CPU": 8.0}, Cluster("local"), (8, {"num_cpus": 1, "num_gpus": 0.0})),
        ({"CPU": 8.0}, Cluster("local", workers=2), (2, {"num_cpus": 4, "num_gpus": 0.0})),
        ({"CPU": 64.0, "GPU": 8.0}, Cluster("auto"), (8, {"num_cpus": 1, "num_gpus": 1.0})),
        ({"CPU": 64.0, "GPU": 8.0}, Cluster("auto", gpus=0.4), (16, {"num_cpus": 1, "num_gpus": 0.4})),
        ({"CPU": 64.0, "GPU": 8.0}, Cluster("auto", gpus=2.0, workers=3), (3, {"num_cpus": 1, "num_gpus": 2.0})),
        ({"CPU": 64.0, "GPU": 8.0}, Cluster("auto", gpus=0), (64, {"num_cpus": 1, "num_gpus": 0.0})),
        ({"CPU": 2.0}, Cluster("local", workers=3), None),
        ({"CPU": 2.0, "GPU": 1.0}, Cluster("local", workers=2), None),
    ],
)
def test_resources(there: dict[str, float], cluster: Cluster, expected: Any) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: there)
    if expected:
        assert actor_resources(ray, cluster) == expected
    else:
        with pytest.raises(ImagicError, match="workers"):
            actor_resources(ray, cluster)


def test_errors_cross_processes() -> None:
    """Ray pickles them: an ImagicError keeps its parts."""
    for error in (ImagicError("a", "b", "c"), DiskFull("a", "b", "c")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.got, again.expected, again.remedy, str(again)) == (type(error), "a", "b", "c", str(error))


class StubRay:
    """Ray without processes: tasks are done in the order in which they were handed out, some by a worker that has died."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, results: dict[str, Any]) -> None:
        self.results, self.most, self.open, self.stops = results, 0, [], 0
        stub = self

        class Method:
            def options(self, name: str) -> Method:
                return self

            def remote(self, group: Any) -> str:
                stub.open.append(group[0].name)
                stub.most = max(stub.most, len(stub.open))
                return group[0].name

        class Stop:
            def remote(self) -> None:
                stub.stops += 1

        self.actors = [SimpleNamespace(fit=Method(), stop=Stop(), progress=Stop()) for _ in range(4)]

    def wait(self, tasks: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return [self.open.pop(0)], []

    def get(self, task: str, timeout: float | None = None) -> Any:
        found = self.results[task]
        if isinstance(found, Exception):
            raise found
        return found


def handed_out(results: dict[str, Any], limit: int, stop: Any = lambda: False) -> tuple[StubRay, Iterator[Update | Outcome]]:
    """A run of groups of one photo each on the stub."""
    ray = StubRay(results)
    groups = iter([[SimpleNamespace(name=name)] for name in results])
    run = RayRun(Cluster("local"), Path("marker"))
    return ray, run._outcomes(ray, ray.actors, groups, limit, stop)  # pyright: ignore[reportArgumentType]


def done(name: str) -> tuple[list[Outcome], None]:
    return [Outcome(SimpleNamespace(name=name))], None  # pyright: ignore[reportArgumentType]


def test_in_flight_is_bounded_and_a_deadly_photo_fails_alone() -> None:
    """Ten thousand photos: the list is not handed out at once."""
    results: dict[str, Any] = {f"n{k}": done(f"n{k}") for k in range(10_000)}
    results["n7"] = StubRay.exceptions.RayError("the actor died")
    ray, items = handed_out(results, 3)
    outcomes = [item for item in items if isinstance(item, Outcome)]
    assert (len(outcomes), ray.most) == (10_000, 3)
    failed = [outcome for outcome in outcomes if outcome.error]
    assert [outcome.entry.name for outcome in failed] == ["n7"]
    assert failed[0].error is not None
    assert f"died {RETRIES + 1} times" in failed[0].error["got"]


def test_a_full_disk_or_an_interruption_ends_the_run_with_what_is_done() -> None:
    """Nothing more is handed out; what runs comes to its end, and is yielded."""
    results: dict[str, Any] = {f"n{k}": done(f"n{k}") for k in range(9)}
    results["n1"] = [], DiskFull("full", "space", "free some")
    ray, items = handed_out(results, 2)
    seen = []
    with pytest.raises(DiskFull):
        seen.extend(items)
    ray, items = handed_out({name: done(name) for name in results}, 2, stop=iter([False, False, True]).__next__)
    with pytest.raises(Stopped):
        seen.extend(items)
    assert ray.stops >= 1
