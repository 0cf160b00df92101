"""The progress of a command, for a program that runs the command's function in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..core.config import RunConfig
    from ..training.stage import StepReport


class Listener(Protocol):
    """What a listener gets, in addition to what the console shows."""

    def step(self, report: StepReport, run: RunConfig) -> None:
        """A step of a fit is done."""

    def progress(self, label: str, done: float, total: float) -> None:
        """So much of a task is done."""


class _Silent:
    def step(self, report: StepReport, run: RunConfig) -> None:
        pass

    def progress(self, label: str, done: float, total: float) -> None:
        pass


_listeners: list[Listener] = [_Silent()]


def listener() -> Listener:
    """Returns the listener of this process; one that does nothing if there is none."""
    return _listeners[-1]


@contextmanager
def listening(to: Listener) -> Iterator[None]:
    """Tells a listener the progress of the commands that this process runs inside the context."""
    _listeners.append(to)
    try:
        yield
    finally:
        _listeners.remove(to)
