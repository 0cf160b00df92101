"""Checks of prompts and settings before sampling starts."""

from __future__ import annotations

from collections.abc import Sequence

from ..bases.base import Base
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..core.text import check_utf8, exact

SEEDS = 2**32
"""Number of different seeds of an image: PyTorch's generator of the CPU, which draws its noise, uses the lower 32 bits of a seed."""


def check_prompt(prompt: str) -> None:
    """Raises ImagicError if a prompt is empty, consists of whitespace, or is not UTF-8."""
    if not prompt.strip():
        raise ImagicError("an empty prompt", "a prompt that describes the edited photo", 'for example "a dog jumping"')
    check_utf8(prompt, "the prompt")


def check_seed(seed: int) -> None:
    """Raises ImagicError if a seed is out of [0, 2^32), where another seed gives the same noise."""
    if not 0 <= seed < SEEDS:
        got = f"seed {seed}, whose noise is that of seed {seed % SEEDS}"
        raise ImagicError(got, f"0 to {SEEDS - 1:,}, the seeds that PyTorch tells apart on the CPU", "change --seed")


def check_strength(config: EditConfig) -> None:
    """Raises ImagicError if ``start="image"`` and the strength leave less than one sampling step."""
    if config.start == "image" and int(config.steps * config.strength) < 1:
        got = f"strength {config.strength:g} with {config.steps} steps"
        raise ImagicError(got, "strength * steps of at least 1", "increase the strength or the number of steps")


def check_scheduler_steps(base: Base, config: EditConfig) -> None:
    """Raises ImagicError if the scheduler of the base does not support the number of sampling steps."""
    scheduler = base.scheduler()
    try:
        scheduler.set_timesteps(config.steps)
    except ValueError as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        got = f"{config.steps} steps with scheduler {type(scheduler).__name__} ({reason})"
        raise ImagicError(got, "a number of steps that the scheduler supports", "use another number of steps") from error


def check_edit(etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str) -> None:
    """Checks the arguments of an edit.

    Args:
        etas: interpolation weights, each in [0, 2].
        seeds: seeds of the starting noise, each in [0, 2^32).
        config: settings of the sampling.
        prompt: the target prompt.

    Raises:
        ImagicError: an eta or a seed is out of range, the prompt is empty or not UTF-8, the strength leaves no sampling step, or several
            seeds would give the same image.
    """
    for eta in etas:
        if not 0 <= eta <= 2:
            raise ImagicError(f"eta {exact(eta)}", "0 (the photo) to 1 (the target prompt), at most 2", "change --eta")
    for seed in seeds:
        check_seed(seed)
    if len(seeds) > 1 and config.start == "inverted" and not config.ddim_eta:
        got = f"{len(seeds)} seeds with start inverted"
        raise ImagicError(
            got, "one seed, because the starting noise is computed from the photo", "use --start noise for several seeds, or add --ddim-eta"
        )
    check_prompt(prompt)
    check_strength(config)
