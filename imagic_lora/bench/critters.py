"""CritterBench: the cases, scored by the judge, as a run of the benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..bases.loading.configs import folder_of_parts
from ..bases.loading.known import known_base
from ..bases.loading.progress import hide_progress_bars
from ..bases.loading.registry import load_base, locate
from ..core.device_config import MemoryConfig
from ..core.environment import prepare_environment
from ..core.runtime import resolve_runtime
from ..critters import render
from ..critters.judge import WEIGHTS, Judge
from ..methods.method import Context, Cost, EditRequest, EditResult, Method
from ..photos.png import write_png
from . import runner
from .bounds import Bounds
from .cases import Case, case_at, given_mask
from .metrics import CritterAlignment
from .runner import Benched, Runner, digest
from .scores import IDENTITY_LIMIT, Score, Scorer

Result = runner.Result[tuple[Score, Cost]]
"""The result of one method on one case: scores and costs."""


@dataclass(frozen=True)
class Bench(Runner[Case, tuple[Score, Cost]]):
    """A run of the benchmark.

    Args:
        seed: seed of the cases.
        cases: number of cases.
        methods: the methods to run on each case.
        out: output folder. It holds one folder of images and results for each case.
        base: name or folder of the base that the methods edit with: an embedded base, or one that was trained with another seed. CLIP and
            the judge are always those of the package.
    """

    seed: int
    cases: int
    methods: Sequence[Benched]
    out: Path
    base: str = "critters"
    owned = ("source", "truth")

    def numbered(self) -> Sequence[tuple[int, Case]]:
        return [(index, case_at(self.seed, index)) for index in range(self.cases)]

    def folder(self, index: int) -> Path:
        return self.out / "cases" / f"{self.seed}-{index:04d}"

    def key(self, method: Benched, index: int, case: Case) -> str:
        return digest([self.seed, index, method.settings, method.rows, _weights(self.base), IDENTITY_LIMIT])

    def begin(self, case: Case, folder: Path) -> None:
        """Writes the photo and the true edit, and loads the base, CLIP and the judge."""
        write_png(render(case.source), folder / "source.png", {})
        write_png(render(case.truth), folder / "truth.png", {})
        _context(self.base)

    def edits(self, method: Benched, case: Case) -> Iterator[EditResult]:
        """Yields the edits of a case by a method. Only the bounds see the true edit; a mask and a noun go to methods that need them."""
        context, _ = _context(self.base)
        needs = method.requires if isinstance(method, Method) else frozenset()
        mask, subject = given_mask(case) if "mask" in needs else None, case.source.animal if "subject" in needs else None
        request = EditRequest(render(case.source), case.prompt, case.source_prompt, mask, subject, seed=case.index)
        return method.edit(context, request, render(case.truth)) if isinstance(method, Bounds) else method.edit(context, request)

    def kept(self, case: Case, edited: EditResult) -> tuple[Score, Cost]:
        _, scorer = _context(self.base)
        return scorer.score(case, edited.image), edited.cost

    def read_kept(self, value: Any) -> tuple[Score, Cost]:
        score, cost = value
        return Score(**score), Cost(**cost)

    def metadata(self, index: int, case: Case) -> dict[str, Any]:
        return {"case": index, "seed": self.seed, "text": case.prompt}


@cache
def _context(base: str) -> tuple[Context, Scorer]:
    """Loads a base, CLIP and the judge once per process. The base runs in fp32, so that scores do not depend on the device."""
    prepare_environment()
    hide_progress_bars()
    clip = CritterAlignment.load()
    loaded = load_base(base, resolve_runtime(MemoryConfig(dtype="fp32", optimizer="adam")))
    return Context(loaded), Scorer(Judge.load(), clip)


@cache
def _weights(base: str) -> str:
    """Returns a digest of the weights of a base, and of CLIP and the judge of the package."""
    places = [WEIGHTS.parent, locate(base), folder_of_parts(known_base(base).entry)]
    folders = [place for place in places if place is not None and place.is_dir()]
    files = sorted(
        {file for folder in folders for file in folder.rglob("*.safetensors")} | {place for place in places if place and place.is_file()}
    )
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
