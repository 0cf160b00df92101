"""What several commands take: flags, and values with a notation of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from ..core.errors import ImagicError

Flag = Annotated[bool, Parameter(negative=())]
"""Given or not; without this there would be a --no- beside it."""
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON object on stdout; everything for people goes to stderr.")]
StoreDir = Annotated[Path, Parameter(name="--store", help="The folder of adapters.")]
DEFAULT_STORE = Path("adapters")


def _whole(_: object, tokens: Sequence[Token]) -> int:
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=_whole)]
"""A whole number; without this 1.5 would be rounded."""


def suggested_etas(eta: float) -> str:
    """Etas to look at first, as ``--eta`` takes them."""
    return f"{max(0.0, eta - 0.4):g}:{min(2.0, eta + 0.4):g}:0.1"


def parse_etas(text: str) -> list[float]:
    """``0.7``, ``0.5,0.7`` or ``0.3:1:0.1``, whose end is included."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        if step <= 0 or stop < start or (stop - start) / step > 1000:
            raise ValueError
        return [round(start + k * step, 6) for k in range(int((stop - start) / step + 1e-6) + 1)]
    except (ValueError, OverflowError) as error:
        raise ImagicError(f"--eta {text}", "a number, several with commas, or start:end:step", "for example --eta 0.3:1:0.1") from error


def parse_seeds(text: str) -> list[int]:
    """``0``, ``0,3`` or ``0:4``, whose end is not included."""
    try:
        if ":" in text:
            start, stop = (int(part) for part in text.split(":"))
            if stop - start > 10_000:
                raise ValueError
            seeds = list(range(start, stop))
        else:
            seeds = [int(part) for part in text.split(",")]
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
            raise ValueError
        return seeds
    except ValueError as error:
        expected = "a whole number from 0, several with commas, or start:end of at most 10000"
        raise ImagicError(f"--seed {text}", expected, "for example --seed 0:4") from error
