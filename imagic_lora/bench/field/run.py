"""Runs methods on the cases of a benchmark of the field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...bases.base import Base
from ...bases.loading.progress import hide_progress_bars
from ...bases.loading.registry import load_base
from ...core.config import RunConfig
from ...core.environment import prepare_environment
from ...core.runtime import resolve_runtime
from ...methods.method import Context, Cost, EditRequest, EditResult, Method
from ...photos.png import write_png
from ..runner import Benched, Result, Runner, digest
from .cases import Case, Picture


@dataclass(frozen=True)
class FieldBench(Runner[Case, Cost]):
    """A run of methods on cases.

    Args:
        cases: the cases.
        methods: the methods, which are no bounds.
        out: output folder. It holds one folder of images and results for each case.
        config: base and memory levers.
        fingerprint: fingerprint of the base, and its precision.
        seed: seed of every edit.
    """

    cases: Sequence[Case]
    methods: Sequence[Benched]
    out: Path
    config: RunConfig
    fingerprint: str
    seed: int
    owned = ("source",)

    def __getstate__(self) -> dict[str, Any]:
        """A worker gets its case with each call, and needs no others."""
        return vars(self) | {"cases": ()}

    def numbered(self) -> Sequence[tuple[int, Case]]:
        return [(case.index, case) for case in self.cases]

    def folder(self, index: int) -> Path:
        return self.out / "cases" / f"{index:04d}"

    def key(self, method: Benched, index: int, case: Case) -> str:
        mask = file_hash(case.mask) if isinstance(case.mask, Path) else case.mask
        request = [case.name, case.problem, file_hash(case.photo), case.prompt, case.source_prompt, mask, self.seed]
        return digest([request, method.settings, method.rows, self.fingerprint])

    def begin(self, case: Case, folder: Path) -> None:
        """Loads the base."""
        opened(self.config)

    def edits(self, method: Benched, case: Case) -> Iterator[EditResult]:
        """Yields the edits of a case by a method. Only methods that need a mask get the one of the benchmark."""
        assert isinstance(method, Method)
        photo = case.read_photo()
        write_png(photo, self.folder(case.index) / "source.png", None)
        mask = case.read_mask(photo.size) if "mask" in method.requires else None
        request = EditRequest(photo, case.prompt, case.source_prompt, mask, seed=self.seed)
        return method.edit(Context(opened(self.config)), request)

    def kept(self, case: Case, edited: EditResult) -> Cost:
        return edited.cost

    def read_kept(self, value: Any) -> Cost:
        return Cost(**value)

    def metadata(self, index: int, case: Case) -> dict[str, Any]:
        return {"case": case.name, "target_prompt": case.prompt, "source_prompt": case.source_prompt, "seed": self.seed}

    def pictures(self, results: Iterable[Result[Cost]]) -> list[Picture]:
        """Returns the pictures of a run, those that failed included, by cases and then by methods."""
        by_job = {(result.case, result.method): result for result in results}
        found = []
        for case in self.cases:
            for method in self.methods:
                result = by_job[case.index, method.name]
                for row in method.rows:
                    path = self.folder(case.index) / f"{row}.png" if row in result.rows else None
                    found.append(Picture(case, row, path, problem=result.error))
        return found


_OPEN: dict[str, Base] = {}


def opened(config: RunConfig) -> Base:
    """Returns the base of a run, loaded once a process."""
    key = config.model_dump_json()
    if key not in _OPEN:
        prepare_environment()
        hide_progress_bars()
        _OPEN[key] = load_base(config.base, resolve_runtime(config.memory), config.revision)
    return _OPEN[key]


def keep(config: RunConfig, base: Base) -> None:
    """Makes :func:`opened` return a base that is loaded already."""
    _OPEN[config.model_dump_json()] = base


def close() -> None:
    """Forgets all bases, so that their memory is free."""
    _OPEN.clear()


@cache
def file_hash(path: Path) -> str:
    """Returns a hash of the bytes of a file, once a process; the empty string if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # ValueError: the path is invalid
        return ""
