"""A few cases of every torture of content: flipped bits, interruptions, numbers, races, odd files, untrusted files, texts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

CASES = {"bits": 40, "interruptions": 45, "places": 24, "numbers": 5, "races": 6, "strangers": 40, "texts": 120}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torture")


SLOW = {"interruptions", "numbers", "places", "races", "strangers", "texts"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_nothing_goes_wrong(name: str, place: Path) -> None:
    """A case that passes yields an empty string."""
    with torch.enable_grad():  # an exception inside torch's own context managers, as "interruptions" makes them, leaves them off
        found = list(import_module(f"torture.{name}").torture(CASES[name], 0, place))
    assert len(found) >= CASES[name]
    assert not (wrong := [text for text in found if text]), "\n".join(wrong)
