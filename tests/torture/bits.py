"""Truncated files and flipped bits in adapters and checkpoints: rejected with the file's name, and accepted again when restored."""

from __future__ import annotations

import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from common import MODES

from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.training.resuming.checkpoints import Checkpoints

from .fitted import STAGES, fitted, verdict

Check = Callable[[Path | None], object]  # of what is in a folder, given the file in it that is broken


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """So many truncations and so many flipped bits, at random places of random files."""
    chance, checks = random.Random(seed), _checks(folder)
    for _ in range(cases):
        for how in (_cut, _flipped):
            root, check = chance.choice(checks)
            path = chance.choice([path for path in sorted(root.rglob("*")) if path.is_file()])
            good = path.read_bytes()
            what, bad = how(good, chance)
            yield verdict((f"{path.relative_to(folder)} {what}", partial(_tried, path, good, bad, check)))


def _cut(good: bytes, chance: random.Random) -> tuple[str, bytes]:
    at = chance.randrange(len(good))
    return f"cut at {at}", good[:at]


def _flipped(good: bytes, chance: random.Random) -> tuple[str, bytes]:
    at, bit = chance.randrange(len(good)), chance.randrange(8)
    return f"with bit {bit} of byte {at} flipped", good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]


def _tried(path: Path, good: bytes, bad: bytes, check: Check) -> None:
    path.write_bytes(bad)
    try:
        check(path)
    finally:
        path.write_bytes(good)
    check(None)


def _checks(folder: Path) -> list[tuple[Path, Check]]:
    """Copies of an adapter of each mode and of a checkpoint of each stage, and how each is to be read."""
    made, store = fitted(folder), Store(folder / "bits")
    shutil.copytree(made.store.root, store.root)
    found: list[tuple[Path, Check]] = [(store.root / mode, partial(_adapter, store, mode)) for mode in MODES]
    whole = store.checkpoints("unfinished")
    early = shutil.copytree(whole, store.checkpoints("early"), ignore=shutil.ignore_patterns("tune-*"))
    for stage, saved in zip(STAGES, (early, whole), strict=True):
        path = next(saved.glob(f"{stage}-*"))
        found.append((path, partial(_checkpoint, Checkpoints(saved), path)))
    return found


def _adapter(store: Store, name: str, broken: Path | None) -> None:
    if not broken:
        store.read(name)
        return
    with pytest.raises(ImagicError, match=re.escape(str(broken))):
        store.read(name)


def _checkpoint(saved: Checkpoints, path: Path, broken: Path | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = saved.newest()
    given = f"{found.record.stage}-{found.record.step:06d}" if found else None
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, ImagicWarning)]
    if not broken:
        assert (given, messages) == (path.name, []), f"restored, and {given} is the newest: {messages}"
        return
    aside = path.with_name(f"{path.name}.broken")
    others = sorted(one.name for one in saved.folder.iterdir() if one != aside)
    aside.rename(path)
    assert given == (others[-1] if others else None), f"{given} is the newest"
    assert len(messages) == 1, f"{len(messages)} warnings"
    assert str(aside) in messages[0], f"not named: {messages}"
    assert str(broken) in messages[0], f"the file is not named: {messages}"
