"""Helpers of the tortures of crashes: small fits, processes that may be killed, and interception of file operations."""

from __future__ import annotations

import hashlib
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from common import PROMPT, opened, tiny_config
from PIL import Image
from tiny import save_tiny

from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.record import RECORD, BaseRecord, Record, SourceRecord
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.training.fit import fit
from imagic_lora.training.resuming.checkpoints import CheckpointRecord, Checkpoints
from imagic_lora.training.stage import StepReport

NAME = "rex"
STEPS = 6  # of either stage
_PATIENCE = 120.0  # seconds, after which a process hangs
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A type of fit, and the number of steps between its checkpoints."""

    mode: Mode
    optimizer: Literal["adam", "adam8bit"]
    every: int

    def __str__(self) -> str:
        return f"{self.mode} with {self.optimizer}, a checkpoint every {self.every}"


KINDS = [Kind("lora", "adam", 1), Kind("lora", "adam8bit", 2), Kind("full", "adam", 2), Kind("full", "adam8bit", 1)]


@dataclass(frozen=True)
class Whole:
    """The result of an uninterrupted fit.

    Args:
        contents: of its adapter.
        operations: all its changes of files, in order, without their data.
    """

    contents: dict[str, str]
    operations: list[Operation]
    seconds: float


@dataclass(frozen=True)
class World:
    """A tiny base and a photo, in a folder of their own."""

    folder: Path

    def fit(self, kind: Kind, store: Path, resume: bool = False) -> Iterator[StepReport]:
        """The steps of a fit that may overwrite what is there."""
        base = _opened(self.base, kind.mode, kind.optimizer)
        return fit(self.photo, PROMPT, self.config(kind), Store(store), NAME, base=base, overwrite=True, resume=resume)

    def whole(self, kind: Kind) -> Whole:
        """What a fit comes to that nothing interrupts; done once."""
        return _whole(self, kind)

    def config(self, kind: Kind) -> RunConfig:
        """Layers so wide that some states of Adam are in 8 bits, if asked for."""
        changes = {"embed": {"steps": STEPS}, "memory": {"optimizer": kind.optimizer}, "checkpoint": {"steps": kind.every}}
        return tiny_config(self.base, kind.mode, **changes, tune={"steps": STEPS} | ({"rank": 16} if kind.mode == "lora" else {}))

    @property
    def base(self) -> Path:
        """The folder of the base."""
        path = self.folder / "base"
        if not path.exists():
            hide_progress_bars()
            save_tiny(path, width=32)
        return path

    @property
    def photo(self) -> Path:
        """Its file."""
        path = self.folder / "photo.png"
        if not path.exists():
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 50, 3), dtype=np.uint8)).save(path)
        return path


@cache
def _opened(folder: Path, mode: Mode, optimizer: str) -> Base:
    return opened(folder, mode, optimizer=optimizer)


@cache
def _whole(world: World, kind: Kind) -> Whole:
    store = world.folder / str(kind)
    store.mkdir(parents=True)
    Adapters().put(store, "1")
    _opened(world.base, kind.mode, kind.optimizer)  # here, so that no child has to

    def work() -> tuple[list[Operation], float]:
        operations: list[Operation] = []

        def noted(operation: Operation, do: Callable[..., Any]) -> Any:
            operations.append(replace(operation, data=b""))
            return do()

        begun = time.perf_counter()
        with watched(store, noted):
            for _ in world.fit(kind, store):
                pass
        return operations, time.perf_counter() - begun

    made = apart(work)
    assert made is not None
    return Whole(contents(store / NAME), *made)


def place(stage: str, step: int) -> int:
    """Steps done, over both stages."""
    return step + (STEPS if stage == "tune" else 0)


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder, without the record of an adapter, which contains the time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: digest for name, digest in found.items() if name != RECORD}


class Adapters:
    """A store with one adapter at the most, whose every file holds its prompt."""

    def put(self, folder: Path, word: str) -> None:
        """Writes one over the one that is there; with no word it removes that."""

        def fill(writer: AtomicWriter) -> None:
            writer.write("unet/config.json", [word.encode()])
            writer.write("unet/weights.safetensors", [word.encode(), bytes(5000)])
            writer.write("card.md", [word.encode()])

        if word:
            Store(folder).write(_record(word), fill, overwrite=True)
        else:
            Store(folder).remove(NAME)

    def found(self, folder: Path) -> str:
        """The prompt of the one that is there; no word where there is none.

        Raises:
            ImagicError, AssertionError: it is not whole.
        """
        if not Store(folder).names():
            return ""
        adapter = Store(folder).read(NAME)
        assert {*contents(adapter.folder)} == {*adapter.record.files}, "other files than those on the record"
        return adapter.record.prompt

    def left(self, folder: Path) -> list[str]:
        """Names of everything else in the folder."""
        return sorted({path.name for path in folder.iterdir()} - {NAME})


class Saved:
    """Checkpoints, whose state is their step."""

    def put(self, folder: Path, word: str) -> None:
        """Saves the one of a step."""
        record = CheckpointRecord(stage="tune", step=int(word), steps=9, inputs={}, seconds={}, threads=1)
        state = {name: torch.full((50,), float(word)) for name in ("latents", "optimised/tokens", "trainables/weight")}
        Checkpoints(folder).save(record, state)

    def found(self, folder: Path) -> str:
        """The step of the newest; no word where there is none.

        Raises:
            AssertionError: it is a mixture.
        """
        newest = Checkpoints(folder).newest()
        if not newest:
            return ""
        assert all((value == newest.record.step).all() for value in newest.tensors.values()), "a mixture"
        return str(newest.record.step)

    def left(self, folder: Path) -> list[str]:
        """Names of everything in the folder except the newest checkpoint."""
        return sorted(path.name for path in folder.iterdir())[:-1]


Shelf = Adapters | Saved


def used_again(adapters: Shelf, folder: Path) -> None:
    """Writes once more what nothing interrupts, after which only that is there."""
    adapters.put(folder, "9")
    assert adapters.found(folder) == "9", "what was written next is not there"
    assert not adapters.left(folder), f"{adapters.left(folder)} is left"


def _record(prompt: str) -> Record:
    return Record(
        name=NAME,
        created="2030-01-01T00:00:00+00:00",
        base=BaseRecord(name="tiny", revision=None, fingerprint="f"),
        parts=[],
        prompt=prompt,
        config=RunConfig(base="tiny"),
        source=SourceRecord(sha256="0" * 64, size=(3, 2), box=(0, 0, 3, 2)),
        losses={},
        seconds={},
        runtime={},
        peak_memory=0,
        versions={},
    )


def apart(work: Callable[[], T], kill_after: float | None = None) -> T | None:
    """The result of ``work`` in a process of its own; None if that was killed, by itself or after ``kill_after`` seconds.

    Raises:
        AssertionError: it raised, hangs, or ended otherwise.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        _answer(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        waiting = not select.select([answer], [], [], _PATIENCE if kill_after is None else kill_after)[0]
        if waiting:
            os.kill(pid, signal.SIGKILL)
        pickled = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert kill_after is not None or not waiting, "it hangs"
    if code == -signal.SIGKILL:
        return None
    assert code == 0, f"it ended with {code}"
    found, trouble = pickle.loads(pickled)
    assert not trouble, trouble
    return found


def _answer(work: Callable[[], Any], writing: int) -> None:
    """Ends the process."""
    try:
        found = work(), None
    except BaseException as error:
        lines = traceback.format_exception(error)
        found = None, f"{type(error).__name__}: {error} | {' | '.join(line.strip() for line in lines[-3:])}"
    with os.fdopen(writing, "wb") as answer:
        answer.write(pickle.dumps(found))
    os._exit(0)


@dataclass(frozen=True)
class Operation:
    """One change of the file system.

    Args:
        kind: ``create``, ``write``, ``fsync``, ``mkdir``, ``rename``, ``unlink`` or ``rmdir``.
        path: relative to the folder that is watched; of a rename, the old one.
        to: of a rename, the new one.
    """

    kind: str
    path: str
    to: str = ""
    data: bytes = b""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.path, self.to)))


def phase(operation: Operation) -> str:
    """What a fit does it for."""
    if ".lock" in operation.path:
        return "claim"
    if ".checkpoints" in operation.path:
        return "tidy" if operation.kind in ("unlink", "rmdir") or operation.to.endswith(".checkpoints.part") else "save"
    return "store"


Act = Callable[[Operation, Callable[..., Any]], Any]


@contextmanager
def watched(root: Path, act: Act) -> Iterator[None]:
    """Every change of files below ``root`` that goes through :mod:`os` is handed to ``act``: the operation, and what does it.

    What does a write takes the bytes that are to be written in the place of the whole.
    """
    real = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")}
    paths: dict[int | None, Path] = {None: root}

    def place(path: Any, folder: int | None = None) -> str:
        return os.path.relpath(paths[folder] / path, root)

    def handled(operation: Operation, do: Callable[..., Any]) -> Any:
        there = operation.kind in ("create", "mkdir") and (root / operation.path).exists()
        return do() if there or operation.path.startswith("..") else act(operation, do)

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def do() -> int:
            return real["open"](path, flags, mode, dir_fd=dir_fd)

        handle = handled(Operation("create", place(path, dir_fd)), do) if flags & os.O_CREAT else do()
        paths[handle] = paths[dir_fd] / path
        return handle

    def close(handle: int) -> None:
        paths.pop(handle, None)
        real["close"](handle)

    def write(handle: int, data: Any) -> int:
        if handle not in paths:
            return real["write"](handle, data)
        return handled(Operation("write", place(paths[handle]), data=bytes(data)), lambda some=data: real["write"](handle, some))

    def fsync(handle: int) -> None:
        handled(Operation("fsync", place(paths[handle])), lambda: real["fsync"](handle))

    def rename(path: Any, to: Any, **folders: Any) -> None:
        handled(Operation("rename", place(path), place(to)), lambda: real["rename"](path, to, **folders))

    def simple(name: str) -> Callable[..., None]:
        def call(path: Any, *mode: int, dir_fd: int | None = None) -> None:
            handled(Operation(name, place(path, dir_fd)), lambda: real[name](path, *mode, dir_fd=dir_fd))

        return call

    new = {"open": open_, "close": close, "write": write, "fsync": fsync, "rename": rename}
    with patch.multiple(os, **new, **{name: simple(name) for name in ("mkdir", "unlink", "rmdir")}):
        yield


def thinned(many: Sequence[T], cases: int) -> list[T]:
    """At most so many of them, evenly spread."""
    return [many[k * len(many) // cases] for k in range(cases)] if cases < len(many) else list(many)
