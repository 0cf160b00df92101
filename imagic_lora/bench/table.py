"""A table of a benchmark, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Args:
        columns: headings of the columns.
        rows: the cells of each row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
