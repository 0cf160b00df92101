"""Ctrl-C and SIGTERM during a fit: the fit finishes the current step, saves a checkpoint and stops."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_MESSAGE = b"\nStopping after this step; a checkpoint is being saved.\n"


class Interrupts:
    """A context in which SIGINT and SIGTERM request the fit to stop.

    While :attr:`finish_step` is False, the first signal raises KeyboardInterrupt at once. Later signals have no effect. The command ``fit``
    sets the attribute to True after the first step.

    Attributes:
        requested: whether a signal has arrived.
        finish_step: whether the fit finishes its step before it stops.
    """

    def __init__(self) -> None:
        self.requested = self.finish_step = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self) -> bool:
        """Returns whether the fit should stop. The fit calls it after every step."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and not self.finish_step:
            raise KeyboardInterrupt
        if first:
            os.write(2, _MESSAGE)  # a handler may interrupt a write, and buffered output is not reentrant
