"""Errors: what is caught broadly says why."""

from __future__ import annotations

import re
from pathlib import Path

import imagic_lora

BROAD = re.compile(r"except (Exception|BaseException)\b|except:|ignore_errors|suppress\(|warnings\.simplefilter\(.ignore")


def test_a_broad_except_has_its_reason_beside_it() -> None:
    """In a comment on its line: nothing falls back in silence because somebody was in a hurry."""
    lines = [
        (path, number, line)
        for path in sorted(Path(imagic_lora.__file__).parent.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BROAD.search(line) and not line.lstrip().startswith(("#", "from ", "import "))
    ]
    assert len(lines) > 5
    assert not [f"{path}:{number}: {line.strip()}" for path, number, line in lines if "  # " not in line]
