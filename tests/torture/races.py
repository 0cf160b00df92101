"""Simultaneous writers of one name, with readers and leftovers of killed processes: one succeeds, the others report an error."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicError
from imagic_lora.training.fit import result

from .fitted import Fitted, files, fitted, verdict

NAME = "rex"
FORK: Any = multiprocessing.get_context("fork")
_SECONDS = 60


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """So many races, half of them of whole fits; and a holder that is killed, for every tenth."""
    made, work, chance = fitted(folder), folder / "races", random.Random(seed)
    for k in range(cases):
        shutil.rmtree(work, ignore_errors=True)
        if k % 10 == 9:
            yield verdict((f"race {k}, a killed holder", partial(_killed, made, work)))
            continue
        write, how = (_fitting, "fits") if k % 2 else (_writing, "writers")
        writers, overwrite, watched = chance.choice((2, 2, 2, 3)), chance.random() < 0.4, chance.random() < 0.5
        left = chance.choice(("nothing", "nothing", "a lock", "a half-written adapter", "an adapter"))
        name = f"race {k}, {writers} {how} over {left}{', overwriting' * overwrite}{', watched' * watched}"
        yield verdict((name, partial(_raced, made, work, partial(write, made, work, overwrite), writers, overwrite, watched, left)))


def _raced(made: Fitted, work: Path, write: Callable[[int], object], writers: int, overwrite: bool, watched: bool, left: str) -> None:
    store, over = Store(work), FORK.Event()
    _left(made, work, left)
    came = _together([*(partial(write, k) for k in range(writers)), *([partial(_reading, work, over)] if watched else [])], writers, over)
    pids, said = zip(*came, strict=True)
    assert said[writers:] in ((), ("",)), f"the reader saw: {said[writers:]}"
    won = [k for k in range(writers) if said[k] == ""]
    if left == "an adapter" and not overwrite:
        assert not won, f"{won} wrote over what was there"
    elif overwrite:
        assert won, f"nobody won: {said}"
    else:
        assert len(won) == 1, f"{won} won: {said}"
    for words in said[:writers]:
        assert not words or _says_so(words, pids, overwrite), f"a loser said: {words}"
    prompts = [_prompt(k) for k in won] or ["an old one"]
    assert store.read(NAME).record.prompt in prompts, "the adapter is not the winner's"
    assert sorted(path.name for path in work.iterdir()) == [NAME], f"left: {sorted(path.name for path in work.iterdir())}"


def _together(works: list[Callable[[], object]], writers: int, over: Any) -> list[tuple[int, str]]:
    """Runs each work in its own process, all starting at once; returns the process ids and the error messages."""
    start, running = FORK.Barrier(len(works)), []
    for work in works:
        mine, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_one, args=(start, theirs, work))
        process.start()
        running.append((process, mine))
    came = []
    for k, (process, messages) in enumerate(running):
        if k == writers:
            over.set()
        came.append((process.pid, messages.recv() if messages.poll(_SECONDS) else "it hangs"))
        process.kill()  # it has nothing to do any more
        process.join()
    return came


def _one(start: Any, messages: Any, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)  # a pool of threads is not forked along
    start.wait(_SECONDS)
    try:
        work()
    except ImagicError as error:
        messages.send(error.got)
    except BaseException:
        messages.send(traceback.format_exc())
    else:
        messages.send("")


def _says_so(said: str, pids: Sequence[int], overwrite: bool) -> bool:
    """Whether a loser says that another process writes, and which, or that the name is taken."""
    found = re.search(r"is being written by (?:process (\d+)|another process)$", said)
    if found:
        return found[1] is None or int(found[1]) in pids
    return not overwrite and said.endswith(f"{NAME} exists")


def _prompt(k: int) -> str:
    return f"of writer {k}"


def _writing(made: Fitted, work: Path, overwrite: bool, k: int) -> None:
    """Writes a copy of an adapter, its photo last, slowly enough that others come in between."""
    chance, content = random.Random(k), files(made.store.root / "lora")
    del content["adapter.json"]

    def fill(writer: AtomicWriter) -> None:
        for name, text in content.items():
            time.sleep(chance.random() / 200)
            writer.write(name, [text])

    record = made.store.read("lora").record.model_copy(update={"name": NAME, "prompt": _prompt(k)})
    Store(work).write(record, fill, overwrite)


def _fitting(made: Fitted, work: Path, overwrite: bool, k: int) -> None:
    quick = made.config(embed={"steps": 1}, tune={"steps": 1})
    result(made.fit(Store(work), NAME, quick, _prompt(k), overwrite=overwrite))


def _reading(work: Path, over: Any) -> None:
    """Reads and lists continuously: an adapter is complete, or reading raises an error."""
    store = Store(work)
    while not over.is_set():
        assert set(store.names()) <= {NAME}
        store.unfinished()
        try:
            adapter = store.read(NAME)
        except ImagicError:
            continue
        assert adapter.record.prompt.startswith(("of writer ", "an old one"))


def _left(made: Fitted, work: Path, what: str) -> None:
    """Prepares the store."""
    work.mkdir()
    if what == "a lock":
        _dead_holder(work)
    elif what == "a half-written adapter":
        _dead_holder(work)
        shutil.copytree(made.store.root / "lora", work / f".{NAME}.part")
        (work / f".{NAME}.part" / "adapter.json").unlink()
    elif what == "an adapter":
        record = made.store.read("lora").record.model_copy(update={"name": NAME, "prompt": "an old one"})
        Store(work).write(record, lambda writer: writer.write("words.md", [b"old"]))


def _dead_holder(work: Path) -> None:
    """A process that is killed while it holds the name."""
    ready = FORK.SimpleQueue()

    def hold() -> None:
        with Store(work).locked(NAME):
            ready.put(None)
            time.sleep(_SECONDS)

    process = FORK.Process(target=hold)
    process.start()
    ready.get()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (work / f".{NAME}.lock").exists()


def _killed(made: Fitted, work: Path) -> None:
    """The next one gets in, by a write and by a fit."""
    for write in (_writing, _fitting):
        _dead_holder(work)
        write(made, work, True, 0)
        assert Store(work).read(NAME).record.prompt == _prompt(0)
        assert [path.name for path in work.iterdir()] == [NAME], "something was left"
