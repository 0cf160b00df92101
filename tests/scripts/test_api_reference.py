"""The page of the public library is the one that its docstrings give."""

from __future__ import annotations

import tomllib
from pathlib import Path

import api_reference
import pytest

import imagic_lora

ROOT = Path(__file__).parents[2]


def test_the_page_of_the_library_is_up_to_date() -> None:
    """``make docs-api`` would change nothing."""
    assert api_reference.PAGE.read_text(encoding="utf-8") == api_reference.page()


def test_every_public_name_is_explained() -> None:
    """With a docstring that names the arguments, and a section of its own."""
    assert api_reference.undocumented() == []
    headings = [line[3:] for line in api_reference.page().splitlines() if line.startswith("## ")]
    names = [name for name in imagic_lora.__all__ if name != "__version__"]
    assert [line for line in headings if line in names] == names


def test_a_docstring_becomes_markdown() -> None:
    """Sections, entries of several lines, and roles of Sphinx."""

    def example(a: int, b: str = "x", *, c: bool = False) -> list[int]:
        """Does ``this`` as :meth:`that` and :func:`~imagic_lora.core.noise.key` do.

        Args:
            a: the first,
                which is long.
            b, c: others.

        Raises:
            ImagicError: a problem: no ``a``.
        """
        return [a]

    assert api_reference.signature("example", example) == "example(a: int, b: str = 'x', *, c: bool = False) -> list[int]"
    assert api_reference.described(api_reference.parsed(example)) == [
        "Does `this` as `that` and `key` do.", "",
        "**Arguments**", "", "- `a`: the first, which is long.", "- `b`, `c`: others.", "",
        "**Raises**", "", "- `ImagicError`: a problem: no `a`.", "",
    ]  # fmt: skip


def test_an_argument_without_a_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a name without a docstring."""

    def silent(steps: int) -> None:
        """Does something."""

    def mute() -> None: ...

    monkeypatch.setattr(imagic_lora, "result", silent)
    monkeypatch.setattr(imagic_lora, "plan", mute)
    assert api_reference.undocumented() == ["plan", "result: steps"]


def test_the_package_is_typed() -> None:
    """The marker is there, and is part of the wheel (tests/test_wheel.py builds one)."""
    assert (ROOT / "imagic_lora" / "py.typed").is_file()
    assert "py.typed" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["imagic_lora"]
