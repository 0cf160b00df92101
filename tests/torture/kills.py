"""Fits are killed at any time or during a save, up to three times; the resumed fit must give the same adapter."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import PROMPT

from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicWarning
from imagic_lora.training.resuming.checkpoints import Checkpoints

from .small import KINDS, NAME, STEPS, Adapters, Kind, Operation, World, apart, contents, phase, place, watched

HITS: Counter[str] = Counter()  # where the kills hit


class Board:
    """Shared memory with the phase of a process and the number of saved steps; it survives the process."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 100)

    def write(self, at: str, saved: int) -> None:
        self.memory[:] = f"{at} {saved}".ljust(100).encode()

    def read(self) -> tuple[str, int]:
        at, saved = self.memory[:].decode().split()
        return at, int(saved)


def go_on(world: World, kind: Kind, store: Path, old: str, board: Board, fatal: int | None) -> bool:
    """What a user does after a crash: checks the store, then resumes the fit, or restarts it if nothing was saved.

    Args:
        old: the prompt of the adapter that was there before the fit.
        fatal: number of the operation during which the process is killed, or None.
    """
    at, saved = board.read()
    operations = 0

    def act(operation: Operation, do: Callable[..., Any]) -> Any:
        nonlocal saved, operations
        board.write(phase(operation), saved)
        if operations == fatal:
            if operation.kind == "write":
                do(operation.data[: len(operation.data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        found = do()
        operations += 1
        if phase(operation) == "save" and operation.kind == "rename" and operation.path.endswith(".part"):
            stage, step = Path(operation.to).name.split("-")
            saved = place(stage, int(step))
        board.write(at, saved)
        return found

    with watched(store, act), warnings.catch_warnings():
        warnings.simplefilter("error", ImagicWarning)
        there, resume = Adapters().found(store), Checkpoints(Store(store).checkpoints(NAME)).any()
        assert there in (old, PROMPT), f"{there!r} is stored, not {old!r}"
        if there == PROMPT and not resume:
            return True
        for report in world.fit(kind, store, resume):
            done = place(report.stage, report.step)
            assert done > saved, f"{saved} steps were saved, and it went on from step {done}"
            at = "preview" if done == 2 * STEPS else report.stage
            board.write(at, saved)
    return True


def case(world: World, kind: Kind, store: Path, rng: random.Random, in_a_save: bool) -> str:
    """Kills a fit and its resumed runs up to three times, then lets it finish; returns the failure or an empty string."""
    whole, board = world.whole(kind), Board()
    old = rng.choice(["", "1"])
    store.mkdir(parents=True)
    if old:
        Adapters().put(store, old)
    story, saved, finished = [f"{kind}, {'an adapter' if old else 'nothing'} before"], 0, None
    try:
        for left in reversed(range(1 + rng.choice([1, 1, 1, 2, 3]))):
            fatal = seconds = None
            if left and in_a_save:
                chosen = rng.choice(sorted({phase(one) for one in whole.operations}))
                fatal = rng.choice([k for k, one in enumerate(whole.operations) if phase(one) == chosen])
            elif left:
                seconds = rng.uniform(0, whole.seconds)
            board.write("start", saved)
            finished = apart(partial(go_on, world, kind, store, old, board, fatal), seconds)
            at, saved = board.read()
            story.append("finished" if finished else f"killed at {at} (change {fatal}, second {seconds}), {saved} saved")
            if left:
                HITS["too late" if finished else at] += 1
        assert finished, "it did not come to its end"
        assert contents(store / NAME) == whole.contents, "its files differ from those of a fit that was not interrupted"
        assert Adapters().found(store) == PROMPT
        Store(store).check_free(NAME, overwrite=True)  # removes the lock file of the last killed process
        assert not Adapters().left(store), f"{Adapters().left(store)} is left"
    except Exception as error:
        return f"{'; '.join(story)}: {type(error).__name__}: {error}"
    return ""


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Every fourth case is killed during a file operation, the others at any time."""
    world = World(folder / "world")
    for number in range(cases):
        rng, store = random.Random(f"{seed} {number}"), folder / f"store-{number}"
        wrong = case(world, rng.choice(KINDS), store, rng, in_a_save=number % 4 == 0)
        yield wrong and f"case {number}: {wrong}"
        shutil.rmtree(store)
