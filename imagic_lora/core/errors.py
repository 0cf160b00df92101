"""Exceptions and the warning that the package raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class ImagicError(Exception):
    """An error that the user can fix: what was got, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.

    Args:
        got: what was found; no full stop at the end.
        expected: what would be valid.
        remedy: what to do; no full stop at the end.
    """

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"{got}. Expected: {expected}. What to do: {remedy}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.got, self.expected, self.remedy)  # an exception is pickled with the arguments of Exception otherwise


class NotFinite(ImagicError):
    """A tensor holds NaN or infinity."""


class ImagicWarning(UserWarning):
    """A warning for the user. The work continues."""


class DiskFull(ImagicError):
    """A disk has too little free space: whatever else is written to it fails as well."""


class SomeFailed(Exception):
    """Some of several independent pieces of work failed, and the others are done. The failures have been reported."""


class Stopped(Exception):
    """A fit has stopped on request. Its progress is saved; the message says where it stopped."""


def unreadable(path: Path | str, error: OSError) -> ImagicError:
    """Returns the error for a file or folder that cannot be read, with the reason that the operating system gives."""
    got = f"{path} cannot be read ({error.strerror or error})"
    if isinstance(error, FileNotFoundError):
        return ImagicError(got, "a path that exists", "check the path")
    return ImagicError(got, "a path that this user may read", "check its permissions, or run the command as its owner")
