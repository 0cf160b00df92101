"""CritterBench: every method on every case, a file for each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..bases.loading.progress import hide_progress_bars
from ..bases.loading.registry import load_base
from ..core.config import MemoryConfig
from ..core.environment import prepare_environment
from ..core.runtime import resolve_runtime
from ..critters import render
from ..critters.judge import WEIGHTS, Judge
from ..methods.method import Context, Cost, EditRequest, Method
from ..photos.png import write_png
from .cases import Case, case_at
from .metrics import CritterAlignment
from .scores import SAME, Score, Scorer
from .worker import begin_worker


@dataclass(frozen=True)
class Result:
    """What came of one method on one case.

    Args:
        rows: score and price by the name of the row; empty where it failed.
        error: why it failed, with the traceback.
    """

    case: int
    method: str
    rows: dict[str, tuple[Score, Cost]]
    error: str | None = None


@dataclass(frozen=True)
class Bench:
    """A run of the benchmark.

    Args:
        seed: of the cases.
        cases: how many of them.
        methods: to run on each.
        out: a folder; holds a folder of pictures and results for each case.
    """

    seed: int
    cases: int
    methods: Sequence[Method]
    out: Path

    def results(self, workers: int = 1) -> Iterator[Result]:
        """Every method on every case, in the order in which they are done; what an earlier run did is not done again.

        A method that raises is recorded as failed, and tried again by the next run.

        Args:
            workers: processes, which share the CPU cores evenly.
        """
        jobs = [(method, index) for index in range(self.cases) for method in self.methods]
        missing = []
        for method, index in jobs:
            found = self._stored(method, index)
            if found is None:
                missing.append((method, index))
            else:
                yield found
        if workers == 1:
            yield from (self.run(method, index) for method, index in missing)
            return
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads,)) as pool:
            running = [pool.submit(self.run, method, index) for method, index in missing]
            try:
                yield from (one.result() for one in as_completed(running))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def folder(self, index: int) -> Path:
        """Where pictures and results of a case are."""
        return self.out / "cases" / f"{self.seed}-{index:04d}"

    def run(self, method: Method, index: int) -> Result:
        """One method on one case, written to its file."""
        case, folder = case_at(self.seed, index), self.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        request = _write_case(case, folder)
        context, scorer = _context()
        rows: dict[str, tuple[Score, Cost]] = {}
        error = None
        try:
            for made in method.pictures(context, request):
                write_png(made.image, folder / f"{made.row}.png", {"case": index, "seed": self.seed, "text": case.text})
                rows[made.row] = (scorer.score(case, made.image), made.cost)
        except Exception:  # one bad case must not end the run; it is counted, and shown with its traceback
            rows, error = {}, traceback.format_exc()
        result = Result(index, method.name, rows, error)
        _write(folder / f"{method.name}.json", {"key": self._key(method, index), **asdict(result)})
        return result

    def _key(self, method: Method, index: int) -> str:
        """Of all that a result depends on."""
        everything = [self.seed, index, method.settings, method.rows, _weights(), SAME]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def _stored(self, method: Method, index: int) -> Result | None:
        """The result of an earlier run, if there is one of the same settings and weights that did not fail."""
        try:
            found = json.loads((self.folder(index) / f"{method.name}.json").read_text(encoding="utf-8"))
            if found["key"] != self._key(method, index) or found["error"]:
                return None
            rows = {row: (Score(**score), Cost(**cost)) for row, (score, cost) in found["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        there = all((self.folder(index) / f"{row}.png").is_file() for row in ("source", "truth", *rows))
        return Result(index, method.name, rows) if there else None


def _write_case(case: Case, folder: Path) -> EditRequest:
    """The task of a case; its photo and its true edit lie beside the results."""
    photo, truth = render(case.source), render(case.truth)
    write_png(photo, folder / "source.png", {})
    write_png(truth, folder / "truth.png", {})
    return EditRequest(photo, case.text, case.index, truth)


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


@cache
def _context() -> tuple[Context, Scorer]:
    """One for a process: the embedded base in fp32, so that figures do not depend on the card."""
    prepare_environment()
    hide_progress_bars()
    clip = CritterAlignment.load()
    base = load_base("critters", resolve_runtime(MemoryConfig(dtype="fp32", optimizer="adam")))
    return Context(base, clip.best), Scorer(Judge.load(), clip)


@cache
def _weights() -> str:
    """A digest of the weights of base, CLIP and judge."""
    files = sorted(WEIGHTS.parent.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
