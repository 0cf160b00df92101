"""What tests of durable files share: a record's bytes by definition, failing system calls, another process that holds a name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from imagic_lora.adapters.store import Store


def sealed(told: dict[str, Any]) -> bytes:
    """The bytes of a record, by the letter of its definition."""
    digest = hashlib.sha256((json.dumps(told, indent=2) + "\n").encode()).hexdigest()
    return (json.dumps(told | {"sha256": digest}, indent=2) + "\n").encode()


def failing(number: int) -> Callable[..., Any]:
    """Stands in for a call of the system: an error."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


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
    """Another process that has a name until the block ends, or it is killed."""
    arguments = [sys.executable, "-c", HOLD, str(store.root / f".{name}.lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()
