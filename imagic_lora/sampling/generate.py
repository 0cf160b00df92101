"""Stage 3: conditioning and denoiser to pictures, through diffusers' own pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..photos.canvas import Canvas, to_image
from .inversion import Retracing, Tracing


def generate(
    base: Base,
    conditionings: Sequence[Conditioning],
    seeds: Sequence[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    sources: Sequence[Conditioning],
) -> Iterator[Image.Image]:
    """One picture for each pair of conditioning and seed, in batches.

    Args:
        conditionings, seeds: of equal length; the noise of a picture depends on its seed alone.
        canvas: the photo as it was trained on; gives the size, and the start with ``start="image"`` or ``"inverted"``.
        null: the unconditional conditioning; None, or a guidance scale of 1 or less, means no guidance.
        sources: for each picture the conditioning that stands for the photo, under which it is inverted with ``start="inverted"``; the
            noise is found once for each of these objects and seed.

    Yields:
        Pictures at the photo's own size, in order, as batches are done.

    Raises:
        ImagicError: as :func:`refuse_no_steps`; a sampler that cannot take ``ddim_eta``; a picture
            holds NaN.
    """
    refuse_no_steps(config)
    of_photo = None
    if config.start == "inverted":
        clean = base.encode_image(canvas.pixels)
        of_photo = cache(partial(traced if config.ddim_eta else inverted, base, canvas, clean, config))
    for start in range(0, len(seeds), config.batch_size):
        part = slice(start, start + config.batch_size)
        noise = [of_photo(*each) for each in zip(sources[part], seeds[part], strict=True)] if of_photo else None
        pixels = _batch(base, concatenate(list(conditionings[part])), list(seeds[part]), config, canvas, null, noise)
        if pixels.isnan().any():
            raise ImagicError("a generated picture holds NaN", "numbers", "try --dtype fp32 or bf16")
        yield from (canvas.restored(to_image(one)) for one in pixels * 2 - 1)


def refuse_empty(prompt: str) -> None:
    """Raises ImagicError for a prompt of nothing but spaces."""
    if not prompt.strip():
        raise ImagicError("an empty prompt", "a sentence that says what the edited photo shows", 'for example "a dog jumping"')


def refuse_no_steps(config: EditConfig) -> None:
    """Raises ImagicError if the strength leaves the sampler less than one of its steps to take from the image."""
    if config.start == "image" and int(config.steps * config.strength) < 1:
        got = f"strength {config.strength:g} of {config.steps} steps"
        raise ImagicError(got, "at least one step: strength times steps is 1 or more", "raise one of them")


def refuse_steps(base: Base, config: EditConfig) -> None:
    """Raises ImagicError if the base's sampler cannot take so many steps."""
    sampler = base.sampler()
    try:
        sampler.set_timesteps(config.steps)
    except ValueError as error:
        got = f"{config.steps} steps of a sampler of kind {type(sampler).__name__} ({next(iter(str(error).splitlines()), '')[:200]})"
        raise ImagicError(got, "as many as it has", "use other --steps") from error


def inverted(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int = 0) -> tuple[Tensor]:
    """The noise from which DDIM without guidance comes back to the photo: DDIM run backwards (arXiv 2010.02502, section 4.3), at the
    conditioning that stands for the photo. Takes and returns what :func:`traced` does; the seed has no say, and no step adds anything."""
    backwards = _with_sampler(base, DDIMInverseScheduler)
    return (_latents(base, backwards, _at_photo(base, canvas, source, config, clean.to(base.runtime.dtype))),)


def traced(base: Base, canvas: Canvas, clean: Tensor, config: EditConfig, source: Conditioning, seed: int) -> tuple[Tensor, ...]:
    """The noise with which DDIM that adds some comes back to the photo: edit-friendly inversion (arXiv 2304.06140, equations 5 and 6).

    The photo is noised to the level of every step, each time anew; what a step has to add to get from one level to the next is kept.

    Args:
        clean: the photo's latents, ``[1, C, h, w]``.
        source: the conditioning that stands for the photo.
        seed: of the noise; other noise leads to the same photo, and to another edit.

    Returns:
        The latents before the first step, then what each step adds, all ``[1, C, h, w]``.
    """
    along = _with_sampler(base, Tracing)
    sampler: Any = along.scheduler
    sampler.set_timesteps(config.steps)
    draws = torch.randn(config.steps, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    noised = sampler.add_noise(clean.expand_as(draws), draws, sampler.timesteps)
    sampler.path, sampler.added = torch.cat([noised, clean]).to(base.runtime.dtype)[:, None], []
    _latents(base, along, _at_photo(base, canvas, source, config, sampler.path[0]) | {"eta": config.ddim_eta})
    return sampler.path[0], *sampler.added


def _at_photo(base: Base, canvas: Canvas, source: Conditioning, config: EditConfig, latents: Tensor) -> dict[str, Any]:
    """What a pipeline is told to go from such latents without guidance, at the conditioning that stands for the photo."""
    high, wide = canvas.pixels.shape[2:]
    how = {"height": high, "width": wide, "latents": latents, "num_inference_steps": config.steps}
    return _spoken(base, source, None) | how | {"guidance_scale": _scale(base, config, guided=False)}


def _batch(
    base: Base,
    text: Conditioning,
    seeds: list[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    noise: list[tuple[Tensor, ...]] | None,
) -> Tensor:
    """Pixels in [0, 1], ``[B, 3, H, W]``; from noise of the photo where there is some, for each picture as of :func:`traced`."""
    batch = len(seeds)
    guided = null is not None and config.guidance_scale > 1
    arguments: dict[str, Any] = _spoken(base, text, null.expand(batch) if null is not None and guided else None) | {
        "guidance_scale": _scale(base, config, guided),
        "num_inference_steps": config.steps,
        "eta": config.ddim_eta,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    if config.start == "image":
        pipe = base.pipeline("image2image")
        if base.architecture.vae["latent_channels"] == 4:
            image = base.encode_image(canvas.pixels).to(base.runtime.dtype)
        else:  # pipelines know latents by their 4 channels; what has others they encode themselves
            image = canvas.pixels / 2 + 0.5
        arguments |= {"image": image.expand(batch, -1, -1, -1), "strength": config.strength}
    else:
        pipe, start = base.pipeline("text2image"), None
        if noise is not None:
            pipe = _with_sampler(base, Retracing if config.ddim_eta else DDIMScheduler)
            start, *pipe.scheduler.added = (torch.cat(each) for each in zip(*noise, strict=True))
        arguments |= {"height": canvas.pixels.shape[2], "width": canvas.pixels.shape[3], "latents": start}
    if config.ddim_eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:  # pyright: ignore[reportAttributeAccessIssue]
        got = f"ddim_eta {config.ddim_eta:g} with a sampler of kind {type(pipe.scheduler).__name__}"  # pyright: ignore[reportAttributeAccessIssue]
        raise ImagicError(got, "one that has it, as DDIM does", "leave ddim_eta at 0")
    return (base.decode(_latents(base, pipe, arguments)) / 2 + 0.5).clamp(0, 1)


def _scale(base: Base, config: EditConfig, guided: bool) -> float:
    """The guidance scale that a pipeline is told: an input of some denoisers, else 1 for none."""
    return config.guidance_scale if guided or base.architecture.embeds_guidance else 1.0


def _with_sampler(base: Base, sampler: Any) -> Any:
    """The text-to-image pipeline with another sampler than the base declares, on the same schedule."""
    pipe: Any = base.pipeline("text2image")
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    return pipe


def _spoken(base: Base, text: Conditioning, null: Conditioning | None) -> dict[str, Any]:
    device, dtype = base.runtime.device, base.runtime.dtype
    return base.spoken(text.to(device, dtype), None if null is None else null.to(device, dtype))


def _latents(base: Base, pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """What a pipeline comes to, before it is decoded."""
    device, dtype = base.runtime.device, base.runtime.dtype
    mixed = base.denoiser.dtype != dtype
    with torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False):
        return pipe(**arguments, output_type="latent").images
