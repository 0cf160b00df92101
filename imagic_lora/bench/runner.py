"""Runs every method on every case. Each result is written to a file, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..adapters.durable import write_text
from ..adapters.writing import check_outputs
from ..core.errors import ImagicError
from ..methods.method import EditResult, Method
from ..photos.png import write_png
from .bounds import Bounds
from .worker import begin_worker

Benched = Method | Bounds
C = TypeVar("C")
"""A case."""
V = TypeVar("V")
"""What is kept of an edited image besides its pixels: its scores, its cost."""
R = TypeVar("R")


@dataclass(frozen=True)
class Result(Generic[V]):
    """The result of one method on one case.

    Args:
        case: number of the case.
        method: name of the method.
        rows: what is kept of each image, by the name of the row; empty if the method failed.
        error: why the method failed, with the traceback of what is no error of its input; None if it did not.
    """

    case: int
    method: str
    rows: dict[str, V]
    error: str | None = None


class Runner(ABC, Generic[C, V]):
    """A run of methods on the cases of a benchmark.

    Attributes:
        methods: the methods to run on each case.
        out: output folder. It holds one folder of images and results for each case.
        owned: names of the images of a case that are no edits.
    """

    methods: Sequence[Benched]
    out: Path
    owned: tuple[str, ...] = ()

    @abstractmethod
    def numbered(self) -> Sequence[tuple[int, C]]:
        """Returns the cases with their numbers."""

    @abstractmethod
    def folder(self, index: int) -> Path:
        """Returns the folder with the images and results of a case."""

    @abstractmethod
    def key(self, method: Benched, index: int, case: C) -> str:
        """Returns a digest of everything that a result depends on."""

    @abstractmethod
    def begin(self, case: C, folder: Path) -> None:
        """Loads what the process needs, and writes the images that a case has itself. What it raises ends the run."""

    @abstractmethod
    def edits(self, method: Benched, case: C) -> Iterator[EditResult]:
        """Yields the edits of a case by a method. What it raises is a failure of the case."""

    @abstractmethod
    def kept(self, case: C, edited: EditResult) -> V:
        """Returns what is kept of an edit."""

    @abstractmethod
    def read_kept(self, value: Any) -> V:
        """Returns what is kept of an edit from its JSON values; raises ValueError, KeyError, TypeError or AttributeError for others."""

    @abstractmethod
    def metadata(self, index: int, case: C) -> dict[str, Any]:
        """Returns what the file of an edited image says of it."""

    def results(self, workers: int = 1) -> Iterator[Result[V]]:
        """Runs every method on every case.

        Results that an earlier run stored are read instead of computed again. If a method raises, its result is stored as failed, and the
        next run tries it again.

        Args:
            workers: number of processes. The CPU cores are divided evenly among them.

        Yields:
            Each result as soon as it is available: first the stored ones, then the others in the order of completion.

        Raises:
            ImagicError: two rows have one name, or a file cannot be written.
        """
        cases = self.numbered()
        self._check_files([index for index, _ in cases])
        missing = []
        for index, case in cases:
            for method in self.methods:
                stored = self._stored(method, index, case)
                if stored is None:
                    missing.append((method, index, case))
                else:
                    yield stored
        yield from parallel(self.run, missing, workers)

    def run(self, method: Benched, index: int, case: C) -> Result[V]:
        """Runs one method on one case, and writes its images and its result into the folder of the case."""
        folder = self.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        self.begin(case, folder)
        rows: dict[str, V] = {}
        error = None
        try:
            for edited in self.edits(method, case):
                write_png(edited.image, folder / f"{edited.row}.png", self.metadata(index, case))
                rows[edited.row] = self.kept(case, edited)
        except Exception as failure:  # a failed case must not end the run: it is counted and reported with its traceback
            rows, error = {}, explained(failure)
        result = Result(index, method.name, rows, error)
        write_text(folder / f"{method.name}.json", json.dumps({"key": self.key(method, index, case), **asdict(result)}, indent=1) + "\n")
        return result

    def _check_files(self, indices: Sequence[int]) -> None:
        """Checks that every row has a file of its own, also where names differ only in case, and that all files can be written."""
        images = [*self.owned, *(row for method in self.methods for row in method.rows)]
        for name, times in Counter(map(str.casefold, images)).items():
            if times > 1:
                got = f"{times} rows of the benchmark have the name {name}"
                raise ImagicError(got, "a name for each row", "rename or leave out a method")
        check_outputs(self.out, ("summary.json", "index.html"))
        check_outputs(self.out / "cases", ())
        files = [*(f"{name}.png" for name in images), *(f"{method.name}.json" for method in self.methods)]
        for folder in filter(Path.exists, map(self.folder, indices)):
            check_outputs(folder, files)

    def _stored(self, method: Benched, index: int, case: C) -> Result[V] | None:
        """Returns the stored result of an earlier run; None if there is none, if it failed, or if what it depends on differs."""
        try:
            stored = json.loads((self.folder(index) / f"{method.name}.json").read_text(encoding="utf-8"))
            if stored["key"] != self.key(method, index, case) or stored["error"]:
                return None
            rows = {row: self.read_kept(value) for row, value in stored["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        complete = all((self.folder(index) / f"{row}.png").is_file() for row in (*self.owned, *rows))
        return Result(index, method.name, rows) if complete else None


def explained(error: Exception) -> str:
    """Returns why something failed: the message of an error of its input, the traceback of any other."""
    return str(error) if isinstance(error, ImagicError) else "".join(traceback.format_exception(error))


def parallel(call: Callable[..., R], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[R]:
    """Calls a function with the arguments of each job, in this process or in several; what it raises ends all.

    Args:
        call: a function that can be pickled.
        jobs: arguments of each call.
        workers: number of processes. The CPU cores are divided evenly among them.

    Yields:
        Each result as soon as it is available.
    """
    if workers == 1:
        yield from (call(*job) for job in jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads,)) as pool:
        running = [pool.submit(call, *job) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(running))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def digest(values: Any) -> str:
    """Returns a hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
