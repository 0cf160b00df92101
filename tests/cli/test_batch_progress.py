"""The time that a batch says is left."""

from __future__ import annotations

import pytest
from common import each

from imagic_lora.cli import batching
from imagic_lora.cli.batching import Shown
from imagic_lora.core.config import RunConfig
from imagic_lora.fleet.outcome import Outcome, Update
from imagic_lora.fleet.table import Entry


@each("together, left", {"one by one": (1, "30 s left"), "together": (4, "0 s left")})
def test_photos_that_are_fitted_together_count_as_begun(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, together: int, left: str
) -> None:
    """Four photos, 10 s until the first is done: 30 s more one by one; together the others follow at once."""
    now, names = [100.0], ["a", "b", "c", "d"]
    monkeypatch.setattr(batching.time, "monotonic", lambda: now[0])
    photo = tmp_path_factory.mktemp("photo") / "a.png"
    with Shown(6, 2) as shown:  # two were done before
        for name in names[:together]:
            shown.show(Update(name, "embed", 1, 2))
        now[0] += 10
        shown.show(Outcome(Entry("line 2", "a", photo, "a dog", None, RunConfig())))
        assert shown.left == left
