"""Runs of a benchmark without its methods, and answers of raters, for the tests of the user study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imagic_lora.bench.cases import case_at
from imagic_lora.bench.study.key import Choice, Key, Shown, checksum
from imagic_lora.critters import render
from imagic_lora.photos.png import write_png


def bench_folder(folder: Path, methods: Sequence[str], cases: int = 4, size: int = 64) -> Path:
    """What ``bench critters`` writes for methods with one row each: their edits are the true one, rotated in hue."""
    for index in range(cases):
        case = case_at(5, index)
        place = folder / "cases" / f"5-{index:04d}"
        place.mkdir(parents=True)
        write_png(render(case.source).resize((size, size)), place / "source.png", {})
        for k, method in enumerate(methods):
            channels = render(case.truth).resize((size, size)).split()
            edit = Image.merge("RGB", channels[k % 3 :] + channels[: k % 3])
            write_png(edit, place / f"{method}.png", {"case": index, "seed": 5, "text": case.prompt})
            result = {"key": "", "case": index, "method": method, "rows": {method: [{}, {}]}, "error": None}
            (place / f"{method}.json").write_text(json.dumps(result))
    return folder


def chosen_side(key: Key, shown: Shown, method: str) -> str:
    """The side of a method's edit; the left one where the question is not about it."""
    return "right" if key.questions[shown.question].edits.get(method) == shown.right else "left"


def answers_file(folder: Path, key: Key, rater: int, sides: Sequence[str]) -> Path:
    """The file that the page exports for a rater who chooses these sides."""
    sheet = key.sheets[rater - 1]
    chosen = [
        Choice(**shown.model_dump(), chosen=shown.left if side == "left" else shown.right, seconds=2.5)
        for shown, side in zip(sheet, sides, strict=True)
    ]
    content = {"version": 1, "study": key.study, "rater": rater, "answers": [one.model_dump() for one in chosen]}
    path = folder / f"answers-{key.study}-{rater}.json"
    path.write_text(json.dumps(content | {"checksum": checksum(key.study, rater, chosen)}))
    return path
