"""Single files that survive a crash: a text that is replaced atomically, and a log of events that one process appends to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .writing import flush_folder, writable

_MAX_READ = 4 * 2**20  # bytes of a log that are read at once


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file. After a crash or a power failure it is either the old or the new one, and of several writers the last one wins.

    Raises:
        ImagicError: the disk is full or cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writable(path.parent):
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        flush_folder(path.parent)


class EventLog:
    """Events, one JSON object a line. An incomplete last line of a killed writer is not an event.

    Args:
        path: the file; created by the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: dict[str, Any]) -> None:
        """Appends an event. Readers see all of it or nothing."""
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if (end := os.lseek(handle, 0, os.SEEK_END)) and self._last_byte(end) != b"\n":
                line = b"\n" + line  # the last writer was killed within a line
            os.write(handle, line)
        finally:
            os.close(handle)

    def read(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Returns the events after an offset in bytes, and the offset of those to come."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.read(_MAX_READ)
        except FileNotFoundError:
            return [], offset
        complete = data[: data.rfind(b"\n") + 1]
        return [event for line in complete.splitlines() if (event := _event(line)) is not None], offset + len(complete)

    def _last_byte(self, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(end - 1)
            return file.read(1)


def _event(line: bytes) -> dict[str, Any] | None:
    """Returns the event of a line; None for one that was cut."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
