"""Flags that several commands share, and the parsing of lists and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from ..core.errors import ImagicError
from ..photos.region import Region

Flag = Annotated[bool, Parameter(negative=())]
"""A switch without the negative form ``--no-...`` that cyclopts adds by default."""
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON object on stdout. Messages go to stderr.")]
StoreDir = Annotated[Path, Parameter(name="--store", help="Folder of the stored adapters.")]
DEFAULT_STORE = Path("adapters")


def _whole(_: object, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
"""An integer. Without the converter, cyclopts rounds 1.5."""


def suggested_etas(eta: float) -> str:
    """Returns a range of etas around an eta, in the notation of ``--eta``."""
    return f"{max(0.0, eta - 0.4):g}:{min(2.0, eta + 0.4):g}:0.1"


def parse_etas(text: str) -> list[float]:
    """Parses etas: ``0.7``, ``0.5,0.7``, or a range ``0.3:1:0.1`` that includes its end. One that occurs twice is returned once.

    Raises:
        ImagicError: the text is in none of these forms, or a range has more than 1001 values.
    """
    try:
        if ":" not in text:
            etas = [float(part) for part in text.split(",")]
        else:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            if step <= 0 or stop < start or (stop - start) / step > 1000:
                raise ValueError
            etas = [float(start + k * step) for k in range(int((stop - start) / step) + 1)]
        return list(dict.fromkeys(eta + 0.0 for eta in etas))  # -0 becomes 0
    except (ValueError, ArithmeticError) as error:
        expected = "a number, several numbers separated by commas, or start:end:step"
        raise ImagicError(f"--eta {text}", expected, "use for example --eta 0.3:1:0.1") from error


def parse_region(text: str) -> Region:
    """Parses a region of the photo, ``X,Y,W,H`` in pixels.

    Raises:
        ImagicError: the text is not four whole numbers.
    """
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        expected = "X,Y,W,H: four whole numbers, the left and top edge, the width and the height in pixels of the photo"
        raise ImagicError(f"--region {text}", expected, "use for example --region 1200,800,1024,1024") from error
    return Region(x, y, width, height)


def parse_seeds(text: str) -> list[int]:
    """Parses seeds: ``0``, ``0,3``, or a range ``0:4`` that excludes its end. One that occurs twice is returned once.

    Raises:
        ImagicError: the text is in none of these forms, a seed is below 0, or a range is empty or has more than 10,000 values.
    """
    try:
        if ":" in text:
            start, stop = (int(part) for part in text.split(":"))
            if stop - start > 10_000:
                raise ValueError
            seeds = list(range(start, stop))
        else:
            seeds = [int(part) for part in text.split(",")]
        if not seeds or min(seeds) < 0:
            raise ValueError
        return list(dict.fromkeys(seeds))
    except ValueError as error:
        expected = "an integer from 0, several integers separated by commas, or start:end with at most 10000 seeds"
        raise ImagicError(f"--seed {text}", expected, "use for example --seed 0:4") from error
