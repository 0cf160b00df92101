"""Flags that several commands share, and the parsing of lists and ranges."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from ..core.config import EditConfig, PresetOrAuto
from ..core.device_config import DeviceConfig
from ..core.errors import ImagicError, unreadable
from ..core.text import slug

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

Flag = Annotated[bool, Parameter(negative=())]
"""A switch without the negative form ``--no-...`` that cyclopts adds by default."""
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON object on stdout. Messages go to stderr.")]
StoreDir = Annotated[Path, Parameter(name="--store", help="Folder of the stored adapters.")]
DEFAULT_STORE = Path("adapters")
MAX_PROMPTS = 1000
"""Number of prompts of a file for ``--prompt-file``."""
_MAX_PROMPT_FILE = 2**20  # bytes


def _whole(_: object, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
"""An integer. Without the converter, cyclopts rounds 1.5."""


def explicit(sampling: EditConfig | None, device: DeviceConfig | None, preset: PresetOrAuto) -> dict[str, Any]:
    """Returns the settings of an edit that flags gave, by their groups; a preset is always one of them."""
    groups = {"edit": sampling, "memory": device}
    return {name: flags.model_dump(exclude_unset=True) if flags else {} for name, flags in groups.items()} | {"preset": preset}


def suggested_etas(eta: float) -> str:
    """Returns a range of etas around an eta, in the notation of ``--eta``."""
    return f"{max(0.0, eta - 0.4):g}:{min(2.0, eta + 0.4):g}:0.1"


def check_interpolates(adapter: Adapter, given: Mapping[str, object], sampling: EditConfig | None = None) -> None:
    """Checks that an adapter of a method without eta is not given what belongs to the interpolation, or to edits of the photo.

    Args:
        adapter: the adapter.
        given: values of flags that the adapters of Imagic alone have; None for those that are not given.
        sampling: settings of stage 3 that flags gave.

    Raises:
        ImagicError: one of them is given.
    """
    method = adapter.record.config.method
    of_eta = {"source_eta", "padding_eta"} & (sampling.model_fields_set if sampling else set())
    flags = [flag for flag, value in given.items() if value is not None] + [f"--{name.replace('_', '-')}" for name in sorted(of_eta)]
    if method != "imagic" and flags:
        got = f"{flags[0]} with adapter {adapter.name}, which is of method {method}"
        expected = "an adapter of method imagic: this one makes images of a prompt, without an eta and without the photo"
        raise ImagicError(got, expected, f"leave out {flags[0]}, and use --prompt and --seed")


def suggested_flags(adapter: Adapter) -> str:
    """Flags for a first edit with an adapter: etas around its own, or a prompt for a method without eta."""
    record = adapter.record
    needed = adapter.withheld and (record.config.edit.start != "noise" or record.config.edit.reference)
    photo = " --photo PHOTO" if needed else ""
    return (
        f"--eta {suggested_etas(record.eta)}" if record.config.method == "imagic" else f"--prompt {shlex.quote(record.prompt)} --seed 0:4"
    ) + photo


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


def prompt_folders(path: Path, parent: Path) -> dict[Path, str | None]:
    """Reads a file of target prompts, one a line. Empty lines are skipped, and a prompt that occurs twice is read once.

    Args:
        path: a text file in UTF-8.
        parent: the folder of the folders.

    Returns:
        The prompt by the folder of its images, whose name begins with the number of the prompt, so that no two prompts share one.

    Raises:
        ImagicError: the file cannot be read, is not UTF-8, holds no prompt, or more than :data:`MAX_PROMPTS`.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_PROMPT_FILE:
            got = f"{path} is not a file, or larger than {_MAX_PROMPT_FILE:,} bytes"
            raise ImagicError(got, "a text file with one prompt a line", "check --prompt-file")
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at U+2028 and form feeds
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ImagicError(f"{path} is not UTF-8", "a text file in UTF-8", "convert it, for example by iconv") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ImagicError(f"{path} has {len(prompts)} prompts", f"1 to {MAX_PROMPTS} prompts, one a line", "correct the file")
    digits = len(str(len(prompts)))
    return {parent / f"{k:0{digits}}-{slug(prompt[:50], 'prompt')}": prompt for k, prompt in enumerate(prompts, 1)}
