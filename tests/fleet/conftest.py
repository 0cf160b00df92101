"""A list of three photos and the command ``batch`` on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batches import TINY, Batch
from common import Run
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos and their list."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (24 + k, 20), colour).save(folder / f"p{k}.png")
    (folder / "list.csv").write_text("photo,prompt,seed\np0.png,a cat,0\np1.png,a dog,1\np2.png,a <b>bird</b>,2\n")
    return folder / "list.csv"


@pytest.fixture
def batch(run: Run, photos: Path, folder: Path) -> Batch:
    """Runs the command on the list: its exit code, the rows of the results by name, and what it printed."""

    def command(*tokens: object, path: Path = photos) -> tuple[int, dict[str, Any], str]:
        code, out, err = run("batch", path, "--base", folder, *TINY, "--out", "out", *tokens)
        results = Path("out/results.jsonl")
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        return code, {row["name"]: row for row in rows}, err + out

    return command
