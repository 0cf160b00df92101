"""A user study of a run of a benchmark of the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from common import Run
from layouts import write_tedbench
from tiny import save_tiny


@pytest.mark.slow
def test_a_study_of_tedbench(run: Run, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    bench = write_tedbench(tmp_path / "tedbench")
    code, out, err = run(
        "bench",
        "tedbench",
        bench,
        "--base",
        folder,
        "--device",
        "cpu",
        "--methods",
        "sdedit,prompt-only",
        "--size",
        64,
        "--metrics",
        "pixels",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert code == 0, err
    code, out, err = run("study", "make", tmp_path / "out", "--methods", "sdedit,prompt-only", "--raters", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["questions"] > 2
