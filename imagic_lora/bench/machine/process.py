"""Starts the process that measures, reads what it sends, and ends it when its time is up."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from typing import IO, Any

from ...core.config import RunConfig
from ...core.errors import ImagicError

MODULE = "imagic_lora.bench.machine"
"""What the process runs."""
_TAIL = 4000  # characters of what a process that failed wrote to stderr


class Failed(Exception):
    """The process ended without a result; the message is what it wrote to stderr."""


def located(base: str, offline: bool) -> str:
    """Returns the path of a base that is a hub id, after a download if it is not in the cache.

    Args:
        base: name of a base, or a hub id.
        offline: whether only the cache is used.

    Raises:
        ImagicError: it is not in the cache, or cannot be downloaded.
    """
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
    for message in _messages({"locate": base}, None, environment, quiet=False):
        if "path" in message:
            return message["path"]
    raise Failed(f"base {base} cannot be located")


def measured(
    run: RunConfig,
    seconds: float,
    end: float | None,
    free: int = 0,
    random_weights: bool = False,
    cap: int | None = None,
    offline: bool = False,
) -> Generator[dict[str, Any], None, None]:
    """Measures a run in a process of its own.

    Args:
        run: the settings of the run.
        seconds: after which a stage takes no more steps.
        end: when the process is ended, in the seconds of ``time.monotonic``; None for never.
        free: free bytes of the card.
        random_weights: whether the base has random weights.
        cap: bytes of the card that PyTorch may use; None for all.
        offline: whether only the cache of the hub is used.

    Yields:
        Objects with one key each: ``card``; ``threads``; for each stage ``measured``, the fields of
        :class:`~imagic_lora.bench.machine.stages.Measured`; ``out_of_memory`` if memory ran out; ``time`` if the process was ended.

    Raises:
        ImagicError: the base cannot be loaded.
        Failed: the process ended in another way.
    """
    job = {"run": run.model_dump(mode="json"), "seconds": seconds, "free": free, "random": random_weights, "cap": cap}
    yield from _messages(job, end, {"HF_HUB_OFFLINE": "1"} if offline else {}, quiet=True)


def _messages(
    job: Mapping[str, Any], end: float | None, environment: Mapping[str, str], quiet: bool
) -> Generator[dict[str, Any], None, None]:
    """What a process sends; closing the iterator ends the process."""
    command = [sys.executable, "-m", MODULE, json.dumps(job)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log if quiet else None,
            env={**os.environ, **environment},
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the command, which ends this process
        )
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while True:
                try:
                    line = lines.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
                except queue.Empty:
                    yield {"time": True}
                    return
                if line is None:
                    break
                message = json.loads(line)
                if "error" in message:
                    raise ImagicError(*message["error"])
                yield message
            if process.wait():
                log.seek(0)
                raise Failed(log.read()[-_TAIL:].strip() or f"exit code {process.returncode}")
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Puts the lines of a stream into a queue, and None at its end."""
    for line in stream:
        lines.put(line)
    lines.put(None)
