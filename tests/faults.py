"""An exception at any step of a piece of work: at every call of chosen functions, or at any moment, as Ctrl-C arrives."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn import Module, init

Calls = Sequence[tuple[Any, str]]
"""Functions by their owner and name."""

MEMORY: Calls = [(Tensor, "copy_"), (Tensor, "to"), (Tensor, "float"), (Module, "__setattr__"), (Module, "requires_grad_"),
                 (Module, "load_state_dict"), (Module, "_apply"), (init, "kaiming_uniform_"), (init, "zeros_")]  # fmt: skip
"""What changes a module."""


class Clock:
    """Counts the steps of a piece of work, and raises an exception at one of them.

    Args:
        at: number of the step, from 0; None never raises.
        error: what is raised.
        lasting: whether it is raised at every later step as well.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt, lasting: bool = False) -> None:
        self.at, self.error, self.lasting, self.steps, self.struck = at, error, lasting, 0, False

    def tick(self) -> None:
        """One step."""
        step, self.steps = self.steps, self.steps + 1
        if self.at is not None and (step == self.at or (self.lasting and step > self.at)):
            self.struck = True
            raise self.error("injected")


def by_calls(clock: Clock, work: Callable[[], object], calls: Calls = MEMORY) -> None:
    """Runs ``work``; every call of one of the functions is a step, before it does anything."""

    def ticking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.tick()
            return real(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in calls:
            stack.enter_context(patch.object(owner, name, ticking(getattr(owner, name))))
        work()


def by_signal(seconds: float, work: Callable[[], object]) -> bool:
    """Runs ``work`` with Ctrl-C after a time, which Python raises wherever it is then; returns whether it arrived in time.

    It can end as another exception: torch has code in C that replaces a KeyboardInterrupt by a ValueError.

    Args:
        seconds: more than 0.
    """

    arrived = False

    def interrupt(*_: object) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, KeyboardInterrupt):
        if not arrived:
            raise
    finally:
        signal.signal(signal.SIGALRM, before)
    return arrived


def every_step(
    run: Callable[[Clock], object], error: type[BaseException] = KeyboardInterrupt, lasting: bool = False, most: int | None = None
) -> Iterator[Clock]:
    """Runs a piece of work once without an interruption, then once for each of its steps, interrupted there; yields after each of those.

    Args:
        run: prepares, and runs the work with a clock.
        error, lasting: as for :class:`Clock`.
        most: so many steps at the most, evenly spread, the first and the last among them.
    """
    whole = Clock()
    run(whole)
    assert whole.steps, "no steps"
    count = min(most or whole.steps, whole.steps)
    for at in sorted({k * (whole.steps - 1) // max(count - 1, 1) for k in range(count)}):
        clock = Clock(at, error, lasting)
        with suppress(error):
            run(clock)
        assert clock.struck, f"step {at} of {whole.steps} was not reached"
        yield clock
