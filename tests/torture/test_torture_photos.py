"""A short torture of photos; ``make torture`` runs all of it."""

from __future__ import annotations

from pathlib import Path

from torture.photos import KINDS, torture


def test_every_kind_of_odd_photo_is_read_correctly_or_rejected(tmp_path: Path) -> None:
    """One or two cases of each type, without the largest ones."""
    results = list(torture(60, seed=6, folder=tmp_path))
    assert len(results) == 60 > len(KINDS)
    assert not any(results), [text for text in results if text]
