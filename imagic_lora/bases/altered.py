"""Changes of a base's denoiser that are undone bit for bit, whatever interrupts them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

from ..core.errors import ImagicError

if TYPE_CHECKING:
    from .base import Base

_ATTEMPTS = 3  # Ctrl-C may arrive more than once


class _Holder:
    """Exists as long as the context of an alteration: an interruption may come before any statement that says that the context ends."""


@dataclass(frozen=True)
class Alteration:
    """A change of a denoiser.

    Args:
        undo: makes the denoiser bit-equal to before. It can be called again after an exception has interrupted it.
        holder: exists while the context of the alteration is open.
    """

    undo: Callable[[], None]
    holder: ReferenceType[_Holder]


@contextmanager
def altered(base: Base, undo: Callable[[], None]) -> Iterator[None]:
    """A context in which the denoiser may be changed. Afterwards it is bit-equal to before.

    An exception that interrupts ``undo``, such as KeyboardInterrupt, is raised after the base is restored. If the base cannot be restored,
    the exception is raised at once, and the next :func:`restore` tries again.

    Args:
        undo: as for :class:`Alteration`.

    Raises:
        ImagicError: as :func:`check_unaltered`.
    """
    check_unaltered(base)
    holder = _Holder()
    base.alteration = Alteration(undo, ref(holder))
    try:
        yield
    finally:
        del holder
        restore(base)


def restore(base: Base) -> None:
    """Undoes an alteration whose context has closed. Without one it does nothing.

    Raises:
        BaseException: what has interrupted it.
    """
    alteration, interruption = base.alteration, None
    if alteration is None or alteration.holder() or sys.is_finalizing():
        return
    for _ in range(_ATTEMPTS):
        try:
            alteration.undo()
        except BaseException as error:  # raised again below, when the base is restored
            interruption = error
        else:
            base.alteration = None
            break
    if interruption:
        try:
            raise interruption
        finally:
            del interruption  # it refers to this frame, and would keep the frames of the caller until the next garbage collection


def check_unaltered(base: Base) -> None:
    """Checks that the denoiser has the base's own weights, and restores them first if an interruption has prevented that.

    Raises:
        ImagicError: a fit that is not finished, or an Editor with an adapter, has changed the denoiser.
        BaseException: the base cannot be restored.
    """
    if base.alteration and base.alteration.holder():
        gc.collect()  # closes a fit that was abandoned in a reference cycle
    restore(base)
    if base.alteration:
        got = f"base {base.name} is in use: an unfinished fit or an Editor has changed its denoiser"
        raise ImagicError(got, "a base with its own weights", "close that fit or Editor first, or open the base a second time")
