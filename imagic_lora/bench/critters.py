"""CritterBench: runs every method on every case. Each result is written to a file, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..adapters.writing import check_outputs
from ..bases.loading.known import CRITTERS
from ..bases.loading.progress import hide_progress_bars
from ..bases.loading.registry import load_base
from ..core.config import MemoryConfig
from ..core.environment import prepare_environment
from ..core.errors import ImagicError
from ..core.runtime import resolve_runtime
from ..critters import render
from ..critters.judge import WEIGHTS, Judge
from ..methods.method import Context, Cost, EditRequest, EditResult, Method
from ..photos.png import write_png
from .bounds import Bounds
from .cases import Case, case_at, given_mask
from .metrics import CritterAlignment
from .scores import IDENTITY_LIMIT, Score, Scorer
from .worker import begin_worker

Benched = Method | Bounds


@dataclass(frozen=True)
class Result:
    """The result of one method on one case.

    Args:
        case: number of the case.
        method: name of the method.
        rows: score and cost by the name of the row; empty if the method failed.
        error: the traceback if the method failed, else None.
    """

    case: int
    method: str
    rows: dict[str, tuple[Score, Cost]]
    error: str | None = None


@dataclass(frozen=True)
class Bench:
    """A run of the benchmark.

    Args:
        seed: seed of the cases.
        cases: number of cases.
        methods: the methods to run on each case.
        out: output folder. It holds one folder of images and results for each case.
        base: folder of the base that the methods edit with: the embedded base, or one that was trained with another seed. CLIP and the
            judge are always those of the package.
    """

    seed: int
    cases: int
    methods: Sequence[Benched]
    out: Path
    base: Path = CRITTERS

    def results(self, workers: int = 1) -> Iterator[Result]:
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
        self._check_files()
        jobs = [(method, index) for index in range(self.cases) for method in self.methods]
        missing = []
        for method, index in jobs:
            stored = self._stored(method, index)
            if stored is None:
                missing.append((method, index))
            else:
                yield stored
        if workers == 1:
            yield from (self.run(method, index) for method, index in missing)
            return
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads,)) as pool:
            running = [pool.submit(self.run, method, index) for method, index in missing]
            try:
                yield from (future.result() for future in as_completed(running))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def folder(self, index: int) -> Path:
        """Returns the folder with the images and results of a case."""
        return self.out / "cases" / f"{self.seed}-{index:04d}"

    def run(self, method: Benched, index: int) -> Result:
        """Runs one method on one case, and writes its images and its result into the folder of the case."""
        case, folder = case_at(self.seed, index), self.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        _write_case(case, folder)
        context, scorer = _context(self.base)
        rows: dict[str, tuple[Score, Cost]] = {}
        error = None
        try:
            for edited in _edits(method, context, case):
                write_png(edited.image, folder / f"{edited.row}.png", {"case": index, "seed": self.seed, "text": case.prompt})
                rows[edited.row] = (scorer.score(case, edited.image), edited.cost)
        except Exception:  # a failed case must not end the run: it is counted and reported with its traceback
            rows, error = {}, traceback.format_exc()
        result = Result(index, method.name, rows, error)
        _write(folder / f"{method.name}.json", {"key": self._key(method, index), **asdict(result)})
        return result

    def _check_files(self) -> None:
        """Checks that every row has a file of its own, also where names differ only in case, and that all files can be written."""
        images = ["source", "truth", *(row for method in self.methods for row in method.rows)]
        for name, times in Counter(map(str.casefold, images)).items():
            if times > 1:
                got = f"{times} rows of the benchmark have the name {name}"
                raise ImagicError(got, "a name for each row", "rename or leave out a method")
        check_outputs(self.out, ("summary.json", "index.html"))
        check_outputs(self.out / "cases", ())
        files = [*(f"{name}.png" for name in images), *(f"{method.name}.json" for method in self.methods)]
        for folder in filter(Path.exists, map(self.folder, range(self.cases))):
            check_outputs(folder, files)

    def _key(self, method: Benched, index: int) -> str:
        """Returns a digest of everything that a result depends on."""
        inputs = [self.seed, index, method.settings, method.rows, _weights(self.base), IDENTITY_LIMIT]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _stored(self, method: Benched, index: int) -> Result | None:
        """Returns the stored result of an earlier run; None if there is none, if it failed, or if its settings or weights differ."""
        try:
            stored = json.loads((self.folder(index) / f"{method.name}.json").read_text(encoding="utf-8"))
            if stored["key"] != self._key(method, index) or stored["error"]:
                return None
            rows = {row: (Score(**score), Cost(**cost)) for row, (score, cost) in stored["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        complete = all((self.folder(index) / f"{row}.png").is_file() for row in ("source", "truth", *rows))
        return Result(index, method.name, rows) if complete else None


def _write_case(case: Case, folder: Path) -> None:
    """Writes the photo and the true edit of a case into its folder."""
    write_png(render(case.source), folder / "source.png", {})
    write_png(render(case.truth), folder / "truth.png", {})


def _edits(method: Benched, context: Context, case: Case) -> Iterator[EditResult]:
    """The edits of a case by a method. Only the bounds see the true edit, and only methods that need a mask or a noun get one."""
    needs = method.requires if isinstance(method, Method) else frozenset()
    mask, subject = given_mask(case) if "mask" in needs else None, case.source.animal if "subject" in needs else None
    request = EditRequest(render(case.source), case.prompt, case.source_prompt, mask, subject, seed=case.index)
    return method.edit(context, request, render(case.truth)) if isinstance(method, Bounds) else method.edit(context, request)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@cache
def _context(folder: Path) -> tuple[Context, Scorer]:
    """Loads a base, CLIP and the judge once per process. The base runs in fp32, so that scores do not depend on the device."""
    prepare_environment()
    hide_progress_bars()
    clip = CritterAlignment.load()
    base = load_base("critters" if folder == CRITTERS else str(folder), resolve_runtime(MemoryConfig(dtype="fp32", optimizer="adam")))
    return Context(base), Scorer(Judge.load(), clip)


@cache
def _weights(folder: Path) -> str:
    """Returns a digest of the weights of a base, and of CLIP and the judge of the package."""
    files = sorted({*WEIGHTS.parent.rglob("*.safetensors"), *folder.rglob("*.safetensors")})
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
