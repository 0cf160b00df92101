"""Links, pipes, plain files and folders without rights in the place of everything that a store keeps: named, never followed or stranded."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common import PROMPT

from imagic_lora.adapters.store import Store
from imagic_lora.cli import app as cli
from imagic_lora.core.errors import ImagicError, ImagicWarning

from .fitted import Case, Fitted, files, fitted, verdict
from .small import NAME, Adapters, apart, thinned

Make = Callable[[Path, Path], object]
PLACES = (NAME, f".{NAME}.checkpoints", f".{NAME}.part", f".{NAME}.old", f".{NAME}.lock", f"..{NAME}.checkpoints.part", "")
RIGHTS = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: what lets root into the folders of others


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Rights(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def like_any_user() -> None:
    """Takes from this process the rights of root over the files of others, so that modes count for it; Linux only."""
    libc, header, rights = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Rights * 2)()
    assert libc.capget(ctypes.byref(header), rights) == 0
    rights[0].effective &= ~RIGHTS
    rights[0].permitted &= ~RIGHTS
    assert libc.capset(ctypes.byref(header), rights) == 0


def _folder(mode: int) -> Make:
    def make(path: Path, outside: Path) -> None:
        path.mkdir()
        (path / "theirs").write_text("words")
        path.chmod(mode)

    return make


KINDS: dict[str, Make] = {
    "a link to an adapter": lambda path, outside: path.symlink_to(outside / "adapter"),
    "a link to a file": lambda path, outside: path.symlink_to(outside / "victim"),
    "a link to a pipe": lambda path, outside: path.symlink_to(outside / "pipe"),
    "a link to nothing": lambda path, outside: path.symlink_to("nothing"),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a plain file": lambda path, outside: path.write_text("words"),
    "a folder": _folder(0o755),
    "a folder without rights": _folder(0),
    "a folder that cannot be emptied": _folder(0o555),
}


def _command(store: Store, *tokens: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main([*tokens, "--store", str(store.root)])
    assert code in (0, 2), f"{' '.join(tokens)}: exit code {code}: {errors.getvalue()}"
    return code


def look(made: Fitted, store: Store) -> None:
    """Nothing that only looks hangs or ends in a traceback."""
    for tokens in (["list"], ["list", "--json"], ["show", NAME], ["show", NAME, "--json"], ["verify"], ["verify", NAME]):
        _command(store, *tokens)


def remove(made: Fitted, store: Store) -> None:
    """What is said to be removed is gone, and the name can be written."""
    if _command(store, "rm", NAME) == 0:
        left = [name for name in (NAME, f".{NAME}.checkpoints", f".{NAME}.part", f".{NAME}.old") if os.path.lexists(store.root / name)]
        assert not left, f"removed, but {left} is left"
        Adapters().put(store.root, "2")


def train(made: Fitted, store: Store, resume: bool = False) -> None:
    """A name that cannot be written is refused before the first step; what was trained is stored."""
    steps, trained, stored = made.fit(store, NAME, overwrite=True, resume=resume), 0, False
    with contextlib.suppress(ImagicError):
        for _ in steps:
            trained += 1
        stored = True
    assert stored or not trained, f"refused after {trained} steps"
    if stored:
        assert store.read(NAME).record.prompt == PROMPT
        assert not os.path.lexists(store.checkpoints(NAME)), "checkpoints are left"


USES: dict[str, Callable[[Fitted, Store], object]] = {"look": look, "rm": remove, "fit": train, "fit --resume": partial(train, resume=True)}


def _tried(made: Fitted, work: Path, place: str, make: Make, use: Callable[[Fitted, Store], object]) -> None:
    store, outside = Store(work / "store"), work / "outside"
    outside.mkdir(parents=True)
    shutil.copytree(made.store.root / "lora", outside / "adapter")
    (outside / "victim").write_text("words")
    os.mkfifo(outside / "pipe")
    before = files(outside)
    try:
        if place:
            store.root.mkdir()
        make(store.root / place if place else store.root, outside)

        def child() -> None:
            like_any_user()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ImagicWarning)  # what remains is said
                use(made, store)  # :func:`apart` fails if it hangs

        apart(child)
        if place or not store.root.is_symlink():
            assert files(outside) == before, "something was changed outside of the store"
        assert (outside / "pipe").is_fifo()
    finally:
        for path in [work, *work.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(work)


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Every place, with everything in it, for every use; in an order of the seed."""
    made, every = fitted(folder), []
    look(made, made.store)  # imports here what every child would import
    for place in PLACES:
        for kind, make in KINDS.items():
            for name, use in USES.items():
                case: Case = (f"{kind} as {place or 'the store'}: {name}", partial(_tried, made, folder / "work", place, make, use))
                every.append(case)
    random.Random(seed).shuffle(every)
    for case in thinned(every, cases):
        yield verdict(case)
