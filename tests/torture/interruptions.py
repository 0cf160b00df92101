"""An exception at every step of a change of a base in memory or of a name on disk; Ctrl-C at random moments."""

from __future__ import annotations

import errno
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import PROMPT, opened, same, weights
from faults import Clock, by_calls, by_signal

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.export import export
from imagic_lora.adapters.store import Store
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

from .fitted import Case, Fitted, fitted, verdict
from .small import Adapters, Operation, Saved, Shelf, thinned, used_again, watched

EDIT = EditConfig(steps=1, guidance_scale=1.0)
STEPS = 60  # at most, of each change in memory: many of its thousands are alike
Trial = Callable[["Room", Clock], object]


class Room:
    """A base, and an editor on it, that many interruptions share; after each the base must be as it was when it was loaded."""

    def __init__(self, made: Fitted, folder: Path) -> None:
        self.made, self.store = made, Store(folder)
        self.base = opened(made.folder, "full")
        self.editor, self.own = Editor(self.base), weights(self.base.denoiser)
        self.loaded: dict[str, Any] = {}
        for mode in ("lora", "full", "embedding"):
            self.editor.load(self.adapter(mode))
            self.loaded[mode] = weights(self.base.denoiser)
        self.editor.close()
        self.frozen = not any(p.requires_grad for p in self.base.denoiser.parameters())
        self.modules = [type(module) for module in self.base.denoiser.modules()]

    def adapter(self, mode: str) -> Adapter:
        """A stored adapter."""
        return self.made.store.read(mode, verify=False)

    def check(self, mode: str | None) -> None:
        """Loads the adapter of a mode, if any; then the editor is closed and the base is its own."""
        if mode:
            self.editor.load(self.adapter(mode))
            assert same(weights(self.base.denoiser), self.loaded[mode]), f"{mode} is loaded wrong"
        self.editor.close()
        assert same(weights(self.base.denoiser), self.own), "the base is another"
        assert [type(module) for module in self.base.denoiser.modules()] == self.modules, "the base has other modules"
        assert self.frozen == (not any(p.requires_grad for p in self.base.denoiser.parameters())), "the base is not frozen"
        assert not self.base.denoiser._forward_pre_hooks, "a hook is left"


def changes() -> dict[str, tuple[Trial, str | None]]:
    """What changes a base, and the adapter that is loaded next."""

    def switch(first: str, second: str) -> Trial:
        def work(room: Room, clock: Clock) -> None:
            room.editor.load(room.adapter(first))
            by_calls(clock, lambda: room.editor.load(room.adapter(second)))

        return work

    def close(mode: str) -> Trial:
        def work(room: Room, clock: Clock) -> None:
            room.editor.load(room.adapter(mode))
            by_calls(clock, room.editor.close)

        return work

    def train(mode: Any) -> Trial:
        def work(room: Room, clock: Clock) -> None:
            made = room.made
            steps = partial(fit, made.photo, PROMPT, made.config(mode), room.store, "one", base=room.base, overwrite=True)
            by_calls(clock, lambda: result(steps()))

        return work

    def compressed(room: Room, clock: Clock) -> None:
        by_calls(clock, lambda: compress(room.adapter("full"), room.base, 2, room.store, "two", True))

    modes = ("lora", "full", "embedding")
    found: dict[str, tuple[Trial, str | None]] = {}
    for first in modes:
        found |= {f"{first}, then {second}": (switch(first, second), second) for second in modes if first != second}
        found[f"{first}, closed"] = close(first), None
        found[f"a fit in mode {first}"] = train(first), None
    return found | {"a compression": (compressed, "full")}


def in_memory(room: Room) -> Iterator[Case]:
    """Each change of a base, interrupted at its steps, by one exception or by exceptions that do not end."""
    for name, (work, after) in changes().items():
        whole = Clock()
        work(room, whole)
        room.check(None)
        for number, at in enumerate(thinned(range(whole.steps), STEPS)):
            yield f"{name}, step {at}", partial(_interrupted, room, work, Clock(at, lasting=number % 3 == 2), after if number % 2 else None)


def _interrupted(room: Room, work: Trial, clock: Clock, after: str | None) -> None:
    with suppress(KeyboardInterrupt):
        work(room, clock)
    assert clock.struck, "the step was not reached"
    if not clock.lasting and not room.base.alteration:
        assert same(weights(room.base.denoiser), room.own), "the exception left before the base was restored"
    room.check(after)
    room.store.check_free("one", overwrite=True)


def at_any_time(room: Room, cases: int, rng: random.Random) -> Iterator[Case]:
    """Ctrl-C at any moment of an edit, a load or a close, wherever Python is then."""
    modes = ("lora", "full", "embedding")

    def some(first: str, second: str) -> None:
        room.editor.load(room.adapter(first))
        list(room.editor.edit(room.adapter(second), [0.5], [1], EDIT))
        room.editor.close()

    seconds = {}
    for first, second in [(first, second) for first in modes for second in modes]:
        start = time.perf_counter()
        some(first, second)
        seconds[first, second] = time.perf_counter() - start
    for _ in range(cases):
        pair = rng.choice(list(seconds))
        when = rng.uniform(1e-5, seconds[pair])

        def work(pair: tuple[str, str] = pair, when: float = when) -> None:
            by_signal(when, partial(some, *pair))
            room.check(pair[1])

        yield f"{pair[0]}, then {pair[1]}, after {when:.6f} s", work


@dataclass(frozen=True)
class Fault:
    """What is raised, before or after a change of a file, and whether it is raised at every later change too."""

    error: BaseException
    late: bool
    lasting: bool


FAULTS = [
    Fault(error, late, lasting)
    for error in (KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO)), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    for late, lasting in ((False, False), (True, False), (False, True))
]


class Exports:
    """An exported adapter; it writes two files that replace those of before."""

    def __init__(self, made: Fitted) -> None:
        self.made = made

    def put(self, folder: Path, word: str) -> None:
        """Exports the adapter of LoRA layers, under its own page."""
        export(self.made.store.read("lora", verify=False), "kohya", folder, overwrite=True)

    def found(self, folder: Path) -> str:
        """Whether every file is whole; none may be left otherwise."""
        return ",".join(sorted(path.suffix for path in folder.iterdir() if path.stat().st_size))


def on_disk(folder: Path, made: Fitted) -> Iterator[Case]:
    """Each change of a file when an adapter or a checkpoint is written, replaced or removed."""
    stories: list[tuple[str, Any, str, str]] = [
        ("an adapter", Adapters(), "", "2"), ("an adapter replaced", Adapters(), "1", "2"), ("an adapter removed", Adapters(), "1", ""),
        ("a checkpoint", Saved(), "", "2"), ("a checkpoint replaced", Saved(), "1", "2"), ("an export", Exports(made), "1", "1"),
    ]  # fmt: skip
    for name, shelf, before, after in stories:
        for fault in FAULTS:
            for at in range(_steps(folder / "count", shelf, before, after, fault)):
                kind = f"{type(fault.error).__name__}{', late' * fault.late}{', lasting' * fault.lasting}"
                yield f"{name}, {kind}, change {at}", partial(_cut, folder / "cut", shelf, before, after, fault, at)


def _steps(folder: Path, shelf: Any, before: str, after: str, fault: Fault) -> int:
    return _worked(folder, shelf, before, after, fault, None)[0]


def _worked(folder: Path, shelf: Any, before: str, after: str, fault: Fault, at: int | None) -> tuple[int, BaseException | None]:
    """Does one change in a new folder and raises the fault at a step of it; returns the number of steps, and what was raised in the end."""
    folder.mkdir(parents=True)
    steps, raised = 0, None
    if before:
        shelf.put(folder, before)

    def act(operation: Operation, do: Callable[..., Any]) -> Any:
        nonlocal steps
        step, steps = steps, steps + 1
        struck = at is not None and (step == at or (fault.lasting and step > at))
        if struck and not fault.late:
            raise fault.error
        found = do()
        if struck:
            raise fault.error
        return found

    try:
        with watched(folder, act):
            shelf.put(folder, after)
    except (KeyboardInterrupt, OSError, ImagicError) as error:
        raised = error.with_traceback(None)
    if at is None:
        _emptied(folder)
    return steps, raised


def _cut(folder: Path, shelf: Shelf | Exports, before: str, after: str, fault: Fault, at: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImagicWarning)  # what could not be deleted is said
            _, raised = _worked(folder, shelf, before, after, fault, at)
        assert not isinstance(raised, OSError), f"{type(raised).__name__} is no message"
        found = shelf.found(folder)
        if isinstance(shelf, Exports):
            shelf.put(folder, after)
            there = {path.name for path in folder.iterdir() if not (fault.lasting and path.name.startswith(".export-"))}
            assert there == {f"lora{end}" for end in (".safetensors", ".embeddings.safetensors", ".md")}, f"{there} are there"
            return
        assert found in ((before, after) if raised else (after,)), f"{found!r} is found, not {before!r} or {after!r}"
        used_again(shelf, folder)
    finally:
        _emptied(folder)


def _emptied(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """A third of the cases each: in memory, at any time, on disk; the first and the last at evenly spread steps."""
    rng, made = random.Random(seed), fitted(folder)
    room = Room(made, folder / "interrupted")
    every = [*thinned(list(in_memory(room)), cases // 3), *at_any_time(room, cases // 3, rng)]
    every += thinned(list(on_disk(folder, made)), cases - len(every))
    for case in every:
        yield verdict(case)
