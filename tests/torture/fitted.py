"""Helpers of the tortures of content: a tiny base, an adapter of each mode, a checkpoint of each stage; forged records; verdicts."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from common import MODES, PROMPT, opened, tiny_config
from PIL import Image
from tiny import save_tiny

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.record import RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.settings.merging import merged
from imagic_lora.training.fit import fit, result
from imagic_lora.training.stage import StepReport

STAGES = ("embed", "tune")
STEPS = 3  # of each stage
Steps = Generator[StepReport, None, Adapter | None]
Case = tuple[str, Callable[[], object]]  # a name, and what raises if all is not well


@dataclass(frozen=True)
class Fitted:
    """A base and what was fitted with it, created once; to be copied, not changed.

    Args:
        folder: of a tiny base.
        photo: a file.
        base: the tiny base, loaded.
        store: adapters ``lora``, ``full`` and ``embedding``, and a fit ``unfinished`` with a checkpoint of each stage.
    """

    folder: Path
    photo: Path
    base: Base
    store: Store

    def config(self, mode: Mode = "lora", **changes: Any) -> RunConfig:
        """A run of 3 + 3 steps with a checkpoint after each."""
        tune = {} if mode == "embedding" else {"steps": STEPS, "batch_size": 1}
        tune |= {"rank": 2, "targets": "attention"} if mode == "lora" else {}
        quick = {"embed": {"steps": STEPS, "batch_size": 1}, "edit": {"steps": 1, "guidance_scale": 1.0}, "checkpoint": {"steps": 1}}
        return tiny_config(self.folder, mode, **merged(quick, {"tune": tune}, changes))

    def fit(self, store: Store, name: str, config: RunConfig | None = None, prompt: str = PROMPT, **options: Any) -> Steps:
        """A fit of the photo with the loaded base."""
        return fit(self.photo, prompt, config or self.config(), store, name, base=self.base, **options)


@cache
def fitted(folder: Path) -> Fitted:
    """Creates everything in a folder."""
    made = Fitted(save_tiny(folder / "base"), folder / "photo.png", opened(folder / "base", "full"), Store(folder / "fitted"))
    Image.radial_gradient("L").resize((40, 32)).convert("RGB").save(made.photo)
    for mode in MODES:
        result(made.fit(made.store, mode, made.config(mode)))
    steps = made.fit(made.store, "unfinished")
    for _ in range(STEPS + 2):
        next(steps)
    steps.close()
    return made


def files(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder, including hidden ones, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def forged(folder: Path, name: str = RECORD, /, **changes: Any) -> None:
    """Changes a record and recomputes its hashes: those of all files, and its own."""
    record = json.loads((folder / name).read_text())
    del record["sha256"], record["files"]
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files(folder).items() if file != name}
    record = merged(record, {"files": hashes}, changes)
    digest = hashlib.sha256(_text(record)).hexdigest()
    (folder / name).write_bytes(_text(record | {"sha256": digest}))


def _text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def drawn(every: Sequence[Case], cases: int, seed: int) -> list[Case]:
    """At most ``cases`` of the cases, in a random order."""
    return random.Random(seed).sample(every, min(cases, len(every)))


def verdict(case: Case) -> str:
    """An empty string if the case passes, otherwise a description of the failure."""
    name, work = case
    try:
        work()
    except (Exception, pytest.fail.Exception) as error:
        return f"{name}: {type(error).__name__}: {error}"
    return ""


class _TooSlow(BaseException):
    """Derives from BaseException, so that no handler of Exception catches it."""


def in_time(work: Callable[[], object]) -> None:
    """Fails if a call takes more than 30 seconds, or more than five seconds of CPU time."""

    def over(*_: object) -> None:
        raise _TooSlow

    began, before = time.process_time(), signal.signal(signal.SIGALRM, over)
    signal.alarm(30)
    try:
        work()
    except _TooSlow:
        raise AssertionError("it hangs") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert (took := time.process_time() - began) < 5, f"took {took:.1f} s"
