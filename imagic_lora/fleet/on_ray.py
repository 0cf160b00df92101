"""Batches on Ray: one actor a device holds the base and fits one photo at a time. Ray replaces actors that die.

Work is safe to repeat: an adapter that is stored is found, and an interrupted fit goes on from its checkpoint. So Ray may run the task of a
dead actor again. All actors write to one store, on a file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.environment import prepare_environment, quick_imports
from ..core.errors import ImagicError, Stopped

if TYPE_CHECKING:  # an actor imports this module before it can prepare the import of torch
    from .outcome import Outcome, Update
    from .table import Entry
    from .work import Work

RETRIES = 2
"""How often a photo is tried again after its actor has died: one that kills every actor must not stop the others."""
_POLL = 1.0  # seconds between two looks at the progress


@dataclass(frozen=True)
class Cluster:
    """Where the actors run.

    Args:
        address: of a running cluster, ``auto`` for that of this machine, or ``local`` to start Ray on this machine alone.
        workers: number of actors; None is one for each share of a GPU, or for each CPU core where there is no GPU.
        gpus: GPUs of an actor; a fraction shares a card. 0 for actors on CPUs.
        max_in_flight: number of photos that are worked on at the same time; None is one for each actor.
    """

    address: str
    workers: int | None = None
    gpus: float = 1.0
    max_in_flight: int | None = None


class FleetWorker:
    """The actor. Ray calls its methods ``stop`` and ``progress`` while ``fit`` runs.

    Args:
        work: the fields of the :class:`~imagic_lora.fleet.work.Work` of every photo.
        marker: a file that the driver holds in the store.
    """

    def __init__(self, work: dict[str, Any], marker: Path) -> None:
        prepare_environment()
        with quick_imports(bitsandbytes=True):
            from ..bases.loading.progress import hide_progress_bars
            from .work import Work, Worker

        hide_progress_bars()
        self._stopping = False
        self._update: Update | None = None
        self._marker, self._worker = marker, Worker(Work(**work), lambda: self._stopping)

    def check(self) -> str | None:
        """Returns why this node cannot work; None if it can."""
        import socket

        if not self._marker.exists():
            return f"node {socket.gethostname()} does not see {self._marker.parent}"
        return None

    def fit(self, group: Sequence[Entry]) -> tuple[list[Outcome], ImagicError | None]:
        """Works on a group, see :func:`~imagic_lora.fleet.work.collected`."""
        from .work import collected

        try:
            return collected(self._worker, group, self._tell)
        finally:
            self._update = None

    def stop(self) -> None:
        """Ends the work after the current step."""
        self._stopping = True

    def progress(self) -> Update | None:
        """Returns the progress of the photo that is worked on."""
        return self._update

    def _tell(self, update: Update) -> None:
        self._update = update


def connect(cluster: Cluster) -> Any:
    """Starts Ray or connects to a cluster, without usage reports, and returns the module.

    Raises:
        ImagicError: Ray is not installed, the address does not answer, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside other work on the machine it would starve
    try:
        import ray
    except ImportError as error:
        raise ImagicError("--ray, but Ray is not installed", "the extra ray", 'install it: pip install "imagic-lora[ray]"') from error
    try:
        with warnings.catch_warnings(), _own_signals():
            warnings.simplefilter("ignore")  # of Ray's start, which concern its developers
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        got = f"Ray at {cluster.address} cannot be used ({next(iter(str(error).strip().splitlines()), type(error).__name__)})"
        raise ImagicError(got, "local, auto, or the address of a running cluster", "check it by: ray status") from error
    return ray


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps the signal handlers of this process: Ray replaces that of SIGTERM by one that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def actor_resources(ray: Any, cluster: Cluster) -> tuple[int, dict[str, float]]:
    """Returns the number of actors, and what each of them reserves.

    Raises:
        ImagicError: the cluster has too little for them.
    """
    there = ray.cluster_resources()
    gpus, cpus = there.get("GPU", 0.0), there.get("CPU", 0.0)
    share = cluster.gpus if gpus else 0.0
    # a fraction of a card fits floor(1 / fraction) times on it, not across two
    most = int(gpus * int(1 / share + 1e-9) if 0 < share <= 1 else gpus / share) if share else int(cpus)
    count = most if cluster.workers is None else cluster.workers
    if not 1 <= count <= most:
        got = f"{count} workers on a cluster with {gpus:g} GPUs and {cpus:g} CPU cores"
        raise ImagicError(got, f"1 to {most} workers", "choose another number of --workers or --gpus-per-worker")
    return count, {"num_cpus": 1 if share else max(1, int(cpus // count)), "num_gpus": share}


@dataclass
class RayRun:
    """A run of groups on Ray; called as :func:`~imagic_lora.fleet.batch.run_here`.

    Args:
        cluster: where the actors run.
        marker: a file that exists in the store while the driver works.
    """

    cluster: Cluster
    marker: Path
    _running: dict[Any, tuple[int, Sequence[Entry]]] = field(default_factory=dict)

    def __call__(self, groups: Iterable[Sequence[Entry]], work: Work, stop: Callable[[], bool]) -> Iterator[Update | Outcome]:
        """Works on groups, each by one actor, and yields progress and outcomes as they come.

        Raises:
            Stopped: ``stop`` returned True; the actors have saved checkpoints.
            ImagicError: Ray cannot be used, a node does not see the store, or an error that ends the whole run.
        """
        if not (waiting := list(groups)):
            return
        ray = connect(self.cluster)
        try:
            count, resources = actor_resources(ray, self.cluster)
            limit = self._limit(count)
            actors = [self._actor(ray, k, resources, work) for k in range(count)]
            if refused := next(filter(None, ray.get([actor.check.remote() for actor in actors])), None):
                raise ImagicError(refused, "a store on a file system that all nodes share", "choose another --store")
            yield from self._outcomes(ray, actors, iter(waiting), limit, stop)
        finally:
            ray.shutdown()

    def _limit(self, count: int) -> int:
        limit = count if self.cluster.max_in_flight is None else self.cluster.max_in_flight
        if not 1 <= limit <= count:
            got = f"--max-in-flight {limit} with {count} workers"
            raise ImagicError(got, f"1 to {count}: a worker has one photo at a time", "change it, or --workers")
        return limit

    def _actor(self, ray: Any, number: int, resources: dict[str, float], work: Work) -> Any:
        """Starts an actor. Ray restarts it when it dies, and runs the task that it had again."""
        remote = ray.remote(concurrency_groups={"control": 1})(_controlled(ray))
        options = {"name": f"imagic-lora {number}", "max_restarts": -1, "max_task_retries": RETRIES, **resources}
        return remote.options(**options).remote(asdict(work), self.marker)

    def _outcomes(
        self, ray: Any, actors: Sequence[Any], waiting: Iterator[Sequence[Entry]], limit: int, stop: Callable[[], bool]
    ) -> Iterator[Update | Outcome]:
        """Hands out groups to idle actors and yields what comes back."""
        idle, failure, stopped = list(range(len(actors))), None, False
        while True:
            stopped = stopped or stop()
            while idle and len(self._running) < limit and not (stopped or failure) and (group := next(waiting, None)) is not None:
                number = idle.pop(0)
                task = actors[number].fit.options(name=f"fit {group[0].name}").remote(group)
                self._running[task] = number, group
            if not self._running:
                break
            if stopped or failure:
                for number, _ in self._running.values():
                    actors[number].stop.remote()  # again each time: a restarted actor does not know
            ready, _ = ray.wait(list(self._running), timeout=_POLL)
            for task in ready:
                number, group = self._running.pop(task)
                idle.append(number)
                outcomes, error = _result(ray, task, group)
                yield from outcomes
                failure = failure or error
            if not ready:
                yield from self._progress(ray, actors)
        if failure:
            raise failure
        if stopped:
            raise Stopped("checkpoints are saved")

    def _progress(self, ray: Any, actors: Sequence[Any]) -> Iterator[Update]:
        """What the actors work on, of those that answer."""
        for number, _ in self._running.values():
            with suppress(ray.exceptions.RayError):  # one that is starting or has died tells nothing
                if update := ray.get(actors[number].progress.remote(), timeout=_POLL):
                    yield update


def _controlled(ray: Any) -> type[FleetWorker]:
    """The class of the actors, whose control methods run beside ``fit``."""

    class ImagicLoraWorker(FleetWorker):
        stop = ray.method(concurrency_group="control")(FleetWorker.stop)
        progress = ray.method(concurrency_group="control")(FleetWorker.progress)

    return ImagicLoraWorker


def _result(ray: Any, task: Any, group: Sequence[Entry]) -> tuple[list[Outcome], ImagicError | None]:
    """The outcomes of a task; failures of its photos if its actor has died again and again."""
    from .outcome import Outcome

    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        failure = {
            "got": f"the worker died {RETRIES + 1} times at this photo ({reason})",
            "expected": "a worker that lives, with enough memory",
            "remedy": "use --preset 8gb, fewer --workers, or look at the logs of Ray; then --retry-failed",
        }
        return [Outcome(entry, error=failure) for entry in group], None
