"""What is checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence

from ..bases.base import Base
from ..core.config import EditConfig
from ..core.errors import ImagicError


def check_prompt(prompt: str) -> None:
    """Raises ImagicError for a prompt of nothing but spaces."""
    if not prompt.strip():
        raise ImagicError("an empty prompt", "a sentence that says what the edited photo shows", 'for example "a dog jumping"')


def check_strength(config: EditConfig) -> None:
    """Raises ImagicError if the strength leaves the sampler less than one of its steps to take from the image."""
    if config.start == "image" and int(config.steps * config.strength) < 1:
        got = f"strength {config.strength:g} of {config.steps} steps"
        raise ImagicError(got, "at least one step: strength times steps is 1 or more", "raise one of them")


def check_scheduler_steps(base: Base, config: EditConfig) -> None:
    """Raises ImagicError if the base's sampler cannot take so many steps."""
    sampler = base.scheduler()
    try:
        sampler.set_timesteps(config.steps)
    except ValueError as error:
        got = f"{config.steps} steps of a sampler of kind {type(sampler).__name__} ({next(iter(str(error).splitlines()), '')[:200]})"
        raise ImagicError(got, "as many as it has", "use other --steps") from error


def check_edit(etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str) -> None:
    """Raises ImagicError for an eta outside [0, 2], an empty prompt, settings that leave the sampler no step, or seeds without a use."""
    for eta in etas:
        if not 0 <= eta <= 2:
            raise ImagicError(f"eta {eta:g}", "0 (the photo) to 1 (the text), at most 2", "choose another --eta")
    if len(seeds) > 1 and config.start == "inverted" and not config.ddim_eta:
        got = f"{len(seeds)} seeds with start inverted"
        raise ImagicError(got, "one: the noise is the photo's own", "use --start noise for several, or add --ddim-eta")
    check_prompt(prompt)
    check_strength(config)
