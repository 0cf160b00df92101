"""Stage 3: conditioning and denoiser to pictures, through diffusers' own pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..photos.canvas import Canvas, to_image
from .checks import check_strength
from .inversion import NoiseReplayer, invert, record_noise
from .pipelines import conditioning_kwargs, pipeline_guidance, pipeline_with_scheduler, sample_latents


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
        ImagicError: as :func:`check_strength`; a sampler that cannot take ``ddim_eta``; a picture
            holds NaN.
    """
    check_strength(config)
    of_photo = None
    if config.start == "inverted":
        clean = base.encode_image(canvas.pixels)
        of_photo = cache(partial(record_noise if config.ddim_eta else invert, base, canvas, clean, config))
    for start in range(0, len(seeds), config.batch_size):
        part = slice(start, start + config.batch_size)
        noise = [of_photo(*each) for each in zip(sources[part], seeds[part], strict=True)] if of_photo else None
        pixels = _batch(base, concatenate(list(conditionings[part])), list(seeds[part]), config, canvas, null, noise)
        if pixels.isnan().any():
            raise ImagicError("a generated picture holds NaN", "numbers", "try --dtype fp32 or bf16")
        yield from (canvas.restored(to_image(one)) for one in pixels * 2 - 1)


def _batch(
    base: Base,
    text: Conditioning,
    seeds: list[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    noise: list[tuple[Tensor, ...]] | None,
) -> Tensor:
    """Pixels in [0, 1], ``[B, 3, H, W]``; from noise of the photo where there is some, for each picture as of :func:`record_noise`."""
    batch = len(seeds)
    guided = null is not None and config.guidance_scale > 1
    arguments: dict[str, Any] = conditioning_kwargs(base, text, null.expand(batch) if null is not None and guided else None) | {
        "guidance_scale": pipeline_guidance(base, config, guided),
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
            pipe = pipeline_with_scheduler(base, NoiseReplayer if config.ddim_eta else DDIMScheduler)
            start, *pipe.scheduler.added = (torch.cat(each) for each in zip(*noise, strict=True))
        arguments |= {"height": canvas.pixels.shape[2], "width": canvas.pixels.shape[3], "latents": start}
    if config.ddim_eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:  # pyright: ignore[reportAttributeAccessIssue]
        got = f"ddim_eta {config.ddim_eta:g} with a sampler of kind {type(pipe.scheduler).__name__}"  # pyright: ignore[reportAttributeAccessIssue]
        raise ImagicError(got, "one that has it, as DDIM does", "leave ddim_eta at 0")
    return (base.decode(sample_latents(base, pipe, arguments)) / 2 + 0.5).clamp(0, 1)
