"""A few cases of each torture that interrupts a writer: kills, power failures, full disks; ``make torture`` runs all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagic_lora.adapters import atomic as durable
from torture import batches, disk, kills, power

Torture = Callable[[int, int, Path], Iterator[str]]


@pytest.mark.parametrize(
    ("torture", "cases"),
    [
        (kills.torture, 1),
        pytest.param(kills.torture, 4, marks=pytest.mark.slow),
        pytest.param(batches.torture, 2, marks=pytest.mark.slow),
        (power.torture, 120),
        pytest.param(disk.torture, 7, marks=pytest.mark.slow),
    ],
    ids=["kill", "kills", "batches", "power", "disk"],
)
def test_nothing_is_lost(torture: Torture, cases: int, tmp_path: Path) -> None:
    """Either the previous or the new version is complete."""
    came_to = list(torture(cases, 0, tmp_path / "torture"))
    assert len(came_to) == cases
    assert "\n".join(filter(None, came_to)) == ""


def test_a_writer_that_flushes_no_folder_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power failures detect a missing flush."""
    monkeypatch.setattr(durable, "flush_folder", lambda folder: None)
    assert any(power.torture(60, 0, tmp_path / "torture"))
