"""Ctrl-C and SIGTERM: a command ends with what is saved; a fit finishes the current step and saves a checkpoint first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ..core.errors import Stopped

_MESSAGE = b"\nStopping after this step; what is done is being saved.\n"


class Interrupts:
    """A context in which SIGINT and SIGTERM interrupt a command.

    While :attr:`finish_step` is False, a signal raises KeyboardInterrupt wherever Python is. Later signals have no effect while that
    exception is handled. C code can replace the exception: when safetensors makes a tensor, torch replaces it by a ValueError. So every
    exception that leaves the context after a signal is an interruption, and leaves it as KeyboardInterrupt.

    While :attr:`finish_step` is True, a signal only requests the fit to stop. The command ``fit`` sets it after the first step.

    Args:
        saved: called if the context is interrupted; returns what is saved, the message of the exception.

    Attributes:
        requested: whether a signal has arrived.
        finish_step: whether the fit finishes its step before it stops.
    """

    def __init__(self, saved: Callable[[], str] = str) -> None:
        self.requested = self.finish_step = False
        self._saved, self._raised = saved, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other thread receives signals or may set a handler
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        replaced = self._raised and isinstance(error, Exception) and not isinstance(error, Stopped)
        if replaced or (isinstance(error, KeyboardInterrupt) and not str(error)):
            raise KeyboardInterrupt(self._saved()) from error

    def stop(self) -> bool:
        """Returns whether the fit should stop. The fit calls it after every step."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self.requested = self.requested, True
        if self.finish_step:
            if not repeated:
                os.write(2, _MESSAGE)  # a handler may interrupt a write, and buffered output is not reentrant
        elif not (repeated and sys.exc_info()[1]):
            self._raised = True
            raise KeyboardInterrupt
