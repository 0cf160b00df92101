"""A little of each torture that cuts a writer off: kills, power cuts, full disks; ``make torture`` does it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagic_lora.adapters import atomic as durable
from torture import disk, kills, power

Torture = Callable[[int, int, Path], Iterator[str]]


@pytest.mark.parametrize(
    ("torture", "cases"), [(kills.torture, 6), (power.torture, 120), (disk.torture, 10)], ids=["kills", "power", "disk"]
)
def test_nothing_is_lost(torture: Torture, cases: int, tmp_path: Path) -> None:
    """Whatever was stored or saved before is there, whole, or what was being written is."""
    came_to = list(torture(cases, 0, tmp_path / "torture"))
    assert len(came_to) == cases
    assert "\n".join(filter(None, came_to)) == ""


def test_a_writer_that_flushes_no_folder_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power cuts are hard enough to tell the difference."""
    monkeypatch.setattr(durable, "_flush", lambda folder: None)
    assert any(power.torture(60, 0, tmp_path / "torture"))
