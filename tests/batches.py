"""Helpers of the tests of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = ("--device", "cpu", "--embed.steps", 3, "--embed.space", "output", "--tune.steps", 3, "--rank", 2, "--edit.steps", 2)
Batch = Callable[..., tuple[int, dict[str, Any], str]]


def contents(store: Path = Path("adapters")) -> dict[str, bytes]:
    """The files of a store but the records, which hold times."""
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != "adapter.json"]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}
