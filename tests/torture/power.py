"""Power failure after every change of a folder, with different models of what the disk has kept."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagic_lora.core.errors import ImagicWarning

from .small import NAME, Adapters, Operation, Saved, Shelf, apart, thinned, used_again, watched


class Node:
    """A file or a folder on a disk: its versions from the one that has been flushed to the newest; bytes, or nodes by name."""

    def __init__(self, content: Any) -> None:
        self.versions = [content]

    @property
    def now(self) -> Any:
        return self.versions[-1]


def choose(model: str, versions: list[Any], depth: int, rng: random.Random) -> Any:
    """The version of a file or folder that a disk has after the power failure.

    Flushed changes are kept. Of the others: ``all``; nothing (``flushed``); folders, but nothing in files (``empty``), or ``half`` of it;
    only the outermost folder (``shallow``), or all but that (``deep``); or ``any`` of it, the changes of each folder in their order.
    """
    first, last = versions[0], versions[-1]
    file = isinstance(first, bytes)
    if model == "any":
        return rng.choice(versions)
    if model == "half" and file:
        return last[: (len(first) + len(last)) // 2]
    lost = {"all": False, "flushed": True, "half": False, "empty": file, "shallow": depth > 0, "deep": depth == 0}
    return first if lost[model] else last


MODELS = ("all", "flushed", "empty", "half", "shallow", "deep", "any", "any")


class Disk:
    """A folder as a disk may have stored it."""

    def __init__(self, folder: Path) -> None:
        self.root = _loaded(folder)

    def find(self, path: str) -> Node:
        """The file or folder that is there now."""
        node = self.root
        for name in Path(path).parts:
            node = node.now[name]
        return node

    def do(self, operation: Operation) -> None:
        """Replays an operation."""
        if operation.kind in ("write", "fsync"):
            node = self.find(operation.path)
            node.versions = node.versions[-1:] if operation.kind == "fsync" else [*node.versions, node.now + operation.data]
            return
        path = Path(operation.path)
        folder = self.find(str(path.parent))
        entries = dict(folder.now)
        made = {"create": b"", "mkdir": {}}.get(operation.kind)
        node = entries.pop(path.name, None) if made is None else Node(made)
        if operation.kind not in ("unlink", "rmdir"):
            entries[Path(operation.to).name or path.name] = node
        folder.versions.append(entries)

    def build(self, folder: Path, model: str, rng: random.Random) -> None:
        """Writes the folder as it is after the power failure."""
        _built(self.root, folder, model, rng)


def _loaded(path: Path) -> Node:
    return Node({one.name: _loaded(one) for one in path.iterdir()} if path.is_dir() else path.read_bytes())


def _built(node: Node, path: Path, model: str, rng: random.Random, depth: int = 0) -> None:
    content = choose(model, node.versions, depth, rng)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir(parents=True)
    for name, below in content.items():
        _built(below, path / name, model, rng, depth + 1)


@dataclass(frozen=True)
class Story:
    """Operations until the power failure.

    Args:
        start: what is there, long since flushed.
        works: what is put there, one after the other; no word for a removal.
        recovers: a writer that was cut off has left something, and the work is to look.
    """

    name: str
    adapters: Shelf
    start: str
    works: tuple[str, ...]
    recovers: bool = False

    def begin(self, folder: Path) -> None:
        """What was before."""
        folder.mkdir(parents=True)
        if self.start:
            self.adapters.put(folder, self.start)
        if self.recovers:
            (folder / NAME).rename(folder / f".{NAME}.old")
            (folder / f".{NAME}.part/unet").mkdir(parents=True)

    def do(self, folder: Path, word: str) -> None:
        """One work."""
        if self.recovers:
            assert self.adapters.found(folder) == word
        else:
            self.adapters.put(folder, word)

    def expected(self, done: int) -> tuple[str, ...]:
        """What may be found when so many works have been done, and the next perhaps; only a removal may come undone."""
        states = (self.start, *self.works)
        return states[done - (done == len(self.works) and not states[-1]) :][:2]


STORIES = [
    Story("first write", Adapters(), "", ("1",)),
    Story("overwriting", Adapters(), "1", ("2", "3")),
    Story("removal", Adapters(), "1", ("2", "")),
    Story("recovery", Adapters(), "1", ("1",), recovers=True),
    Story("checkpoints", Saved(), "1", ("2", "3")),
]


def traced(story: Story, folder: Path) -> list[tuple[int, Operation]]:
    """Every change that the works of a story make, and how many of them were done by then; in a process that is gone afterwards."""

    def work() -> list[tuple[int, Operation]]:
        trace: list[tuple[int, Operation]] = []
        for done, word in enumerate(story.works):

            def noted(operation: Operation, do: Callable[..., Any], done: int = done) -> Any:
                found = do()
                trace.append((done, operation))
                return found

            with watched(folder, noted):
                story.do(folder, word)
        return trace

    trace = apart(work)
    assert trace, "it was killed"
    return trace


def outcome(story: Story, disk: Disk, trace: list[tuple[int, Operation]], cut: int, model: str, folder: Path, rng: random.Random) -> str:
    """What is wrong with what is found after the first ``cut`` changes."""
    for _, operation in trace[:cut]:
        disk.do(operation)
    expected = story.expected(trace[cut][0] if cut < len(trace) else len(story.works))
    disk.build(folder, model, rng)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ImagicWarning)
            found = story.adapters.found(folder)
        assert found in expected, f"{found!r} was found, not {' or '.join(map(repr, expected))}"
        used_again(story.adapters, folder)
    except Exception as error:
        after = trace[cut - 1][1] if cut else "nothing"
        return f"{story.name}, cut off after {cut} of {len(trace)} changes ({after}), disk {model!r}: {type(error).__name__}: {error}"
    return ""


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Every story cut off after every change, on every kind of disk."""
    trials: list[tuple[Story, Disk, list[tuple[int, Operation]], int, str]] = []
    for story in STORIES:
        live = folder / story.name
        try:
            story.begin(live)
            disk, trace = Disk(live), traced(story, live)
        except Exception as error:
            yield f"{story.name}: {type(error).__name__}: {error}"
            continue
        trials += [(story, disk, trace, cut, model) for cut in range(len(trace) + 1) for model in MODELS]
    for number, (story, disk, trace, cut, model) in enumerate(thinned(trials, cases)):
        found = folder / f"cut-{number}"
        yield outcome(story, deepcopy(disk), trace, cut, model, found, random.Random(f"{seed} {number}"))
        shutil.rmtree(found)
