"""The disk is full at any change of a file: the error reports it, nothing is lost, and work continues once there is space."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from common import PROMPT

from imagic_lora.adapters.store import Store
from imagic_lora.cli.app import main
from imagic_lora.core.errors import ImagicError
from imagic_lora.training.resuming.checkpoints import Checkpoints

from .small import (
    KINDS,
    NAME,
    STEPS,
    Act,
    Adapters,
    Kind,
    Operation,
    Saved,
    Shelf,
    World,
    apart,
    contents,
    phase,
    place,
    thinned,
    used_again,
    watched,
)

FAULTS = ("full", "torn", "quota", "short")
LIMIT = 20_000  # bytes: more than a checkpoint of stage embed has, less than one of stage tune
Fault = tuple[int, str] | int  # changes that there is room for, and what then; or the size that files may have


def failing(first: int, fault: str) -> Act:
    """A disk with room for so many changes.

    Then it is ``full``, but for renames later on, or so after half a write (``torn``); or over its ``quota`` for a moment; or it does
    half of every write (``short``), which is no error.
    """
    count = 0

    def act(operation: Operation, do: Callable[..., Any]) -> Any:
        nonlocal count
        if not needs_room(operation):
            return do()
        count += 1
        if count <= first or (count > first + 1 and (fault == "quota" or operation.kind == "rename")):
            return do()
        if operation.kind == "write" and (fault == "short" or (fault == "torn" and count == first + 1)):
            return do(operation.data[: max(1, len(operation.data) // 2)])
        if fault == "short":
            return do()
        code = errno.EDQUOT if fault == "quota" else errno.ENOSPC
        raise OSError(code, os.strerror(code), operation.path)

    return act


def needs_room(operation: Operation) -> bool:
    """Whether the operation can fail on a full disk; writing the process id into a lock file is optional."""
    return operation.kind in ("create", "write", "fsync", "mkdir", "rename") and (operation.kind, phase(operation)) != ("write", "claim")


def cramped(folder: Path, fault: Fault, work: Callable[[], Any], look: Callable[[], Any]) -> tuple[str, Any]:
    """The error that the work ends with on such a disk, and what is seen there then; for a process of its own."""
    if isinstance(fault, int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault, fault))
    with nullcontext() if isinstance(fault, int) else watched(folder, failing(*fault)):
        try:
            work()
        except ImagicError as error:
            return str(error), look()
    return "", look()


def of_a_shelf(adapters: Shelf, fault: Fault, folder: Path) -> None:
    """Something is to be written over what is there."""
    folder.mkdir()
    adapters.put(folder, "1")
    short = not isinstance(fault, int) and fault[1] == "short"
    message, found = apart(partial(cramped, folder, fault, partial(adapters.put, folder, "2"), partial(adapters.found, folder))) or ("", "")
    assert ("is full" in message) != short, message or "no error"
    assert found == adapters.found(folder) == ("2" if short else "1"), f"{found!r} is found, {adapters.found(folder)!r} with room"
    used_again(adapters, folder)


def of_a_fit(world: World, kind: Kind, fault: Fault, saved: int | None, store: Path) -> None:
    """A fit is to replace an adapter.

    Args:
        saved: steps that must be saved by then, at least; None where it comes to its end all the same.
    """
    store.mkdir()
    Adapters().put(store, "1")

    def run(resume: bool) -> int:
        """Gives the first step."""
        return next(iter([place(report.stage, report.step) for report in world.fit(kind, store, resume)]), 0)

    def look() -> tuple[str, int]:
        newest = Checkpoints(Store(store).checkpoints(NAME)).newest()
        return Adapters().found(store), place(newest.record.stage, newest.record.step) if newest else 0

    message, found = apart(partial(cramped, store, fault, partial(run, False), look)) or ("", ("", 0))
    assert found == look(), f"{found} is found, {look()} with room"
    if saved is None:
        assert not message, message
    else:
        assert "is full" in message, message or "no error"
        assert (PROMPT, 0) > found >= ("1", saved), f"{found} is found, and {saved} steps were saved"
    if message or found[1]:
        first = apart(partial(run, found[1] > 0))
        assert first == (found[1] + 1) % (2 * STEPS + 1), f"{found[1]} steps were saved, and it went on from step {first}"
    assert contents(store / NAME) == world.whole(kind).contents, "its files differ from those of a fit that had room"
    assert Adapters().found(store) == PROMPT
    assert not Adapters().left(store), f"{Adapters().left(store)} is left"


def of_a_command(world: World, store: Path) -> None:
    """A fit from the command line."""
    kind, file = KINDS[0], store / "config.yaml"
    store.mkdir()
    file.write_text(json.dumps(world.config(kind).model_dump(mode="json", exclude_unset=True)))
    tokens = ["fit", str(world.photo), PROMPT, "--config", str(file), "--name", NAME, "--store", str(store)]

    def run(*more: str) -> tuple[int, str]:
        with redirect_stderr(io.StringIO()) as message, redirect_stdout(io.StringIO()):
            return main([*tokens, *more]), " ".join(message.getvalue().split())

    def limited() -> tuple[int, str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        return run()

    code, message = apart(limited) or (0, "")
    assert (code, "is full" in message, "--resume" in message) == (2, True, True), f"exit code {code}: {message}"
    code, message = apart(partial(run, "--resume")) or (1, "")
    assert code == 0, f"exit code {code}: {message}"
    assert contents(store / NAME) == world.whole(kind).contents, "its files differ from those of a fit that had room"


def saved_by(operations: list[Operation]) -> int | None:
    """Steps whose checkpoint is on the disk after some changes; None where the adapter itself is."""
    renamed = saved = 0
    for one in operations:
        if phase(one) == "save" and one.kind == "rename":
            stage, step = Path(one.to).name.split("-")
            renamed = place(stage, int(step))
        if one.kind == "fsync" and one.path == f".{NAME}.checkpoints":
            saved = renamed
        if one.to == NAME:
            renamed = None
        if one.kind == "fsync" and one.path == ".":
            saved = renamed
    return saved


def changes(adapters: Shelf, folder: Path) -> int:
    """How many changes that need room it takes to write over what is there."""
    folder.mkdir()
    adapters.put(folder, "1")
    count = 0

    def act(operation: Operation, do: Callable[..., Any]) -> Any:
        nonlocal count
        count += needs_room(operation)
        return do()

    with watched(folder, act):
        adapters.put(folder, "2")
    return count


def trials(rng: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What is tried, and on what disk."""
    for adapters in (Adapters(), Saved()):
        name = type(adapters).__name__.lower()
        many = changes(adapters, folder / name)
        faults: list[Fault] = [(first, fault) for first in range(many) for fault in FAULTS]
        for fault in [*faults, 0, 2, 100, 600]:
            yield f"{name}, {fault}", partial(of_a_shelf, adapters, fault)
    world = World(folder / "world")
    yield "the command line", partial(of_a_command, world)
    for kind in (one for one in KINDS if one.every == 1):
        operations = [one for one in world.whole(kind).operations if needs_room(one)]
        groups: dict[tuple[str, str], list[int]] = {}
        for number, one in enumerate(operations):
            group = "end" if saved_by(operations[:number]) is None else phase(one)
            groups.setdefault((group, one.kind), []).append(number)
        chosen = [(rng.choice(group), fault) for group in groups.values() for fault in ("full", "torn", "quota")]
        for first, fault in chosen:
            name = f"{kind}, {first}, {fault} ({operations[first]})"
            yield name, partial(of_a_fit, world, kind, (first, fault), saved_by(operations[:first]))
        yield f"{kind}, short writes", partial(of_a_fit, world, kind, (0, "short"), None)
        for size, saved in ((0, 0), (LIMIT, STEPS)):
            yield f"{kind}, files of {size} bytes at most", partial(of_a_fit, world, kind, size, saved)


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Every change when an adapter and a checkpoint are replaced, some of every kind in whole fits, and one command."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, work) in enumerate(thinned(list(trials(random.Random(seed), folder)), cases)):
        try:
            work(folder / str(number))
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"
        else:
            yield ""
        shutil.rmtree(folder / str(number))
