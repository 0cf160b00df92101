"""Checks of prompts and settings before sampling starts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from torch import Tensor

from ..bases.base import Base
from ..bases.process import Diffusion, Flow
from ..core.config import EditConfig
from ..core.errors import ImagicError, ImagicWarning
from ..core.text import check_utf8, exact

_WEIGHTED = re.compile(r"\([^()]+:\s*[0-9.]+\s*\)")
SEEDS = 2**32
"""Number of different seeds of an image: PyTorch's generator of the CPU, which draws its noise, uses the lower 32 bits of a seed."""


def check_prompt(prompt: str) -> None:
    """Raises ImagicError if a prompt is empty, consists of whitespace, or is not UTF-8."""
    if not prompt.strip():
        raise ImagicError("an empty prompt", "a prompt that describes the edited photo", 'for example "a dog jumping"')
    check_utf8(prompt, "the prompt")
    warn_of_weights(prompt)


def check_seed(seed: int) -> None:
    """Raises ImagicError if a seed is out of [0, 2^32), where another seed gives the same noise."""
    if not 0 <= seed < SEEDS:
        got = f"seed {seed}, whose noise is that of seed {seed % SEEDS}"
        raise ImagicError(got, f"0 to {SEEDS - 1:,}, the seeds that PyTorch tells apart on the CPU", "change --seed")


def warn_of_weights(prompt: str) -> None:
    """Warns if a prompt has weights such as ``(word:1.3)``, which are read as plain text."""
    if weighted := _WEIGHTED.search(prompt):
        message = f"weights in prompts are not supported: {weighted[0]!r} is read as plain text"
        warnings.warn(message, ImagicWarning, stacklevel=1)


def check_sampling(config: EditConfig) -> None:
    """Checks settings of the sampling that exclude each other on every base.

    Raises:
        ImagicError: ``start="image"`` or ``"flow"`` and the strength leave less than one sampling step; the start cannot take the scheduler
            or ``ddim_eta``; the negative prompt is not UTF-8.
    """
    if config.start == "inverted" and (config.scheduler not in ("base", "ddim") or config.karras_sigmas):
        got = f"scheduler {config.scheduler}{' with Karras sigmas' if config.karras_sigmas else ''} with start inverted"
        remedy = "use --scheduler ddim --no-karras-sigmas, or another --start"
        raise ImagicError(got, "DDIM, because the photo is inverted by DDIM run backwards", remedy)
    check_utf8(config.negative_prompt, "the negative prompt")
    warn_of_weights(config.negative_prompt)
    if config.start == "flow" and config.ddim_eta:
        got = f"ddim_eta {config.ddim_eta:g} with start flow"
        raise ImagicError(got, "ddim_eta 0: start flow adds noise of its own at every level", "use --ddim-eta 0, or another --start")
    if config.start in ("image", "flow") and int(config.steps * config.strength) < 1:
        got = f"strength {config.strength:g} with {config.steps} steps"
        raise ImagicError(got, "strength * steps of at least 1", "increase the strength or the number of steps")


def check_scheduler(base: Base, config: EditConfig) -> None:
    """Checks that a base can be sampled with the scheduler of the settings.

    Raises:
        ImagicError: the scheduler does not support the number of steps or Karras sigmas; or it samples at timesteps that a distilled base
            was not trained at. The base takes no reference image. The base is a flow, and the scheduler is one of diffusion, or there is
            guidance and the base has none. The base is a diffusion, and the start is one of flows.
    """
    if config.reference:
        base.check_reference()
    if isinstance(base.process, Flow):
        if config.scheduler not in ("base", "euler") or config.karras_sigmas:
            got = f"scheduler {config.scheduler}{' with Karras sigmas' if config.karras_sigmas else ''} on {base.name}, a flow"
            raise ImagicError(got, "base or euler: flows are sampled by Euler's method", "use --scheduler base --no-karras-sigmas")
        if config.guidance_scale > 1 and base.architecture.guidance == "none":
            got = f"guidance scale {config.guidance_scale:g} on {base.name}, a distilled base that samples without guidance"
            raise ImagicError(got, "a guidance scale of at most 1", "leave out --guidance-scale, or use --guidance-scale 0")
        return
    if config.start == "flow":
        got = f"start flow on {base.name}, a diffusion"
        raise ImagicError(got, "a flow, such as Stable Diffusion 3 or FLUX.2 klein", "use --start inverted, or another base")
    scheduler = base.sampler(config.scheduler, config.karras_sigmas)
    try:
        scheduler.set_timesteps(config.steps)
    except ValueError as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        got = f"{config.steps} steps with scheduler {type(scheduler).__name__} ({reason})"
        raise ImagicError(got, "a number of steps that the scheduler supports", "use another number of steps") from error
    if config.scheduler == "base" and not config.karras_sigmas:
        return
    trained = base.process.trained_timesteps if isinstance(base.process, Diffusion) else None
    if trained is not None and not set(scheduler.timesteps.long().tolist()) <= set(trained.tolist()):
        got = f"scheduler {config.scheduler} with {config.steps} steps, which samples at other timesteps than {base.name} was distilled at"
        raise ImagicError(got, "a scheduler that samples at the timesteps of the base", "use --scheduler base")
    if config.scheduler == "lcm" and trained is None:
        message = f"scheduler lcm is for latent consistency models; {base.name} is not distilled, so images will be blurred"
        warnings.warn(message, ImagicWarning, stacklevel=1)


def check_pixels(pixels: Tensor) -> None:
    """Raises ImagicError if generated pixels, of any shape, hold NaN."""
    if pixels.isnan().any():
        raise ImagicError("a generated image holds NaN", "finite numbers", "try --dtype fp32 or bf16")


def check_range(etas: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ImagicError if an eta is out of [0, 2], or a seed out of [0, 2^32)."""
    for eta in etas:
        if not 0 <= eta <= 2:
            raise ImagicError(f"eta {exact(eta)}", "0 (the photo) to 1 (the target prompt), at most 2", "change --eta")
    for seed in seeds:
        check_seed(seed)


def check_edit(etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str) -> None:
    """Checks the arguments of an edit.

    Args:
        etas: interpolation weights, each in [0, 2].
        seeds: seeds of the starting noise, each in [0, 2^32).
        config: settings of the sampling.
        prompt: the target prompt.

    Raises:
        ImagicError: an eta or a seed is out of range, the prompt is empty or not UTF-8, the strength leaves no sampling step, several
            seeds would give the same image, or the start cannot take the scheduler.
    """
    check_range(etas, seeds)
    if len(seeds) > 1 and config.start == "inverted" and not config.ddim_eta:
        got = f"{len(seeds)} seeds with start inverted"
        raise ImagicError(
            got, "one seed, because the starting noise is computed from the photo", "use --start noise for several seeds, or add --ddim-eta"
        )
    check_prompt(prompt)
    check_sampling(config)
