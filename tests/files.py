"""Helpers for tests of atomic files: the bytes of a manifest, failing system calls, another process that holds a lock."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagic_lora.adapters.store import Store


def manifest_bytes(fields: dict[str, Any]) -> bytes:
    """The bytes of a manifest, computed from the definition of the format."""
    digest = hashlib.sha256((json.dumps(fields, indent=2) + "\n").encode()).hexdigest()
    return (json.dumps(fields | {"sha256": digest}, indent=2) + "\n").encode()


def failing(number: int) -> Callable[..., Any]:
    """A replacement for a system call that raises OSError with this number."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def forbid(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Makes files unreadable, and folders as those of another user with mode 0700: they cannot be listed or entered. For root too."""

    def refusing(call: Callable[..., Any], inside_only: bool) -> Callable[..., Any]:
        def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
            for place in places if isinstance(path, (str, Path)) else ():
                entered = place in Path(path).parents or (Path(path) == place and not inside_only)
                if entered:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *arguments, **options)

        return guarded

    monkeypatch.setattr(os, "stat", refusing(os.stat, inside_only=True))
    for module, name in ((os, "listdir"), (os, "scandir"), (os, "open"), (io, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name), inside_only=False))


HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.write(handle, str(os.getpid()).encode())
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def rival(store: Store, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a name until the block ends or the process is killed."""
    arguments = [sys.executable, "-c", HOLD, str(store.root / f".{name}.lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def interrupted_removal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C arrives as soon as a folder that exists is about to be removed; fails if it does not."""

    def interrupt(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield
