"""Stops a fit while images are sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...bases.base import Base
from ...core.errors import Stopped


@contextmanager
def stop_while_sampling(base: Base, stop: Callable[[], bool], saved_message: str = "") -> Iterator[None]:
    """Calls ``stop`` before every call of the denoiser, so that a fit can also be stopped while images are sampled.

    Args:
        base: the base that samples.
        stop: returns whether the fit stops.
        saved_message: message of the exception.

    Raises:
        Stopped: ``stop`` returned True.
    """

    def raise_if_stopped(*_: object) -> None:
        if stop():
            raise Stopped(saved_message)

    hook = base.denoiser.register_forward_pre_hook(raise_if_stopped)
    try:
        yield
    finally:
        hook.remove()
