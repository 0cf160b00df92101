"""Ctrl-C and SIGTERM while a fit runs: the step is finished, what was trained is saved, and only then it stops."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_SAID = b"\nStopping after this step; what was trained is being saved.\n"


class Interrupts:
    """A context in which the two signals raise a flag.

    Before there is anything to finish (:attr:`gentle` is False) the first of them raises KeyboardInterrupt at once, as Python does; any
    further one changes nothing.
    """

    def __init__(self) -> None:
        self.asked = self.gentle = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {one: signal.signal(one, self._noted) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def stop(self) -> bool:
        """What a fit asks after every step."""
        return self.asked

    def _noted(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and not self.gentle:
            raise KeyboardInterrupt
        if first:
            os.write(2, _SAID)  # a handler may interrupt whoever is writing: no buffers here
