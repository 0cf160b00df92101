"""Lists of etas and seeds, as they are written on the command line."""

from __future__ import annotations

import pytest
from common import each

from imagic_lora.cli.options import parse_etas, parse_seeds
from imagic_lora.core.errors import ImagicError


@each(
    "text, etas",
    [
        ("0.7", [0.7]),
        ("1", [1.0]),
        ("0.5,0.7", [0.5, 0.7]),
        ("0.7, 0.5", [0.7, 0.5]),
        ("0.4:0.9:0.1", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.3:1:0.1", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("0.5:0.5:0.1", [0.5]),
        ("0.7:0.7000003:0.0000001", [0.7, 0.7000001, 0.7000002, 0.7000003]),
        ("0.7,0.5,0.70,7e-1", [0.7, 0.5]),
        ("-0,0", [0.0]),
    ],
)
def test_etas_are_one_several_or_a_range_with_its_end(text: str, etas: list[float]) -> None:
    """The numbers are those a person would write, without the dust of binary fractions, and each is there once."""
    assert list(map(str, parse_etas(text))) == list(map(str, etas))


@each("text", ["", "a", "0.5,", "0:1", "0:1:0", "0:1:-0.1", "1:0:0.1", "0:1:1e-9", "0:inf:0.1", "0:1:nan", "0:1:0.1:2"])
def test_other_etas_are_refused(text: str) -> None:
    """The error repeats what was got."""
    with pytest.raises(ImagicError) as caught:
        parse_etas(text)
    assert caught.value.got == f"--eta {text}"


@each(
    "text, seeds",
    [
        ("0", [0]),
        ("3,0,3", [3, 0]),
        ("0,3", [0, 3]),
        ("5, 2", [5, 2]),
        ("0:4", [0, 1, 2, 3]),
        ("7:8", [7]),
        ("0:10000", list(range(10_000))),
    ],
)
def test_seeds_are_one_several_or_a_range_without_its_end(text: str, seeds: list[int]) -> None:
    """As Python counts."""
    assert parse_seeds(text) == seeds


@each("text", ["", "a", "1.5", "-1", "0,", "0:", "4:4", "4:0", "-2:2", "0:4:1", "0:10001", "0:99999999999"])
def test_other_seeds_are_refused(text: str) -> None:
    """The error repeats what was got; nothing is cut short in silence."""
    with pytest.raises(ImagicError) as caught:
        parse_seeds(text)
    assert caught.value.got == f"--seed {text}"
