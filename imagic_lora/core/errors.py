"""The one error a user can mend, and the one warning."""

from __future__ import annotations


class ImagicError(Exception):
    """Something the user can put right: what was got, what was expected, what to do next.

    The command line prints it without a traceback and exits with code 2.

    Args:
        got: what was found, as a sentence without its full stop.
        expected: what would have been right.
        remedy: what to do next.
    """

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"{got}. Expected: {expected}. What to do: {remedy}.")


class NotFinite(ImagicError):
    """Numbers that should be finite are not."""


class ImagicWarning(UserWarning):
    """Something the user should know of; the work goes on."""


class Stopped(Exception):
    """A fit that was asked to stop has stopped; what it has come to is saved, as the message says."""
