"""Stage 3: generates images from conditionings and seeds through diffusers pipelines."""

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
from .checks import check_pixels, check_sampling
from .inversion import NoiseReplayer, invert, record_noise
from .pipelines import conditioning_kwargs, pipeline_guidance, rescale_kwargs, sample_latents, sampling_pipeline


def generate(
    base: Base,
    conditionings: Sequence[Conditioning],
    seeds: Sequence[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    sources: Sequence[Conditioning],
) -> Iterator[Image.Image]:
    """Generates one image for each pair of conditioning and seed, in batches.

    Args:
        base: the base with the adapter applied.
        conditionings: the conditioning ``e_eta`` of each image.
        seeds: the seed of each image, as many as conditionings; the noise of an image depends only on its seed.
        config: settings of the sampling.
        canvas: the photo that the adapter was trained on; it gives the image size, and the start for ``start="image"`` or ``"inverted"``.
        null: what guidance leads away from, see :func:`~imagic_lora.sampling.pipelines.negative`; None, or a guidance scale of 1 or less,
            turns guidance off.
        sources: the conditioning of the photo for each image, used to invert it with ``start="inverted"``; the inversion runs once for
            each pair of seed and conditioning object.

    Yields:
        Images at the size of the photo, in order, after each batch.

    Raises:
        ImagicError: the strength leaves no sampling step, the scheduler does not support ``ddim_eta``, the pipeline has no
            ``guidance_rescale``, or an image holds NaN.
    """
    check_sampling(config)
    inversion = None
    if config.start == "inverted":
        clean = base.encode_image(canvas.pixels)
        inversion = cache(partial(record_noise if config.ddim_eta else invert, base, canvas, clean, config))
    for start in range(0, len(seeds), config.batch_size):
        batch = slice(start, start + config.batch_size)
        noise = [inversion(source, seed) for source, seed in zip(sources[batch], seeds[batch], strict=True)] if inversion else None
        pixels = _generate_batch(base, concatenate(list(conditionings[batch])), list(seeds[batch]), config, canvas, null, noise)
        check_pixels(pixels)
        yield from (canvas.restored(to_image(image)) for image in pixels * 2 - 1)


def _generate_batch(
    base: Base,
    conditioning: Conditioning,
    seeds: list[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    noise: list[tuple[Tensor, ...]] | None,
) -> Tensor:
    """Generates one batch of images.

    Args:
        conditioning: the conditioning of the batch, ``[B, ...]``.
        seeds: the seed of each image.
        noise: for each image the noise from :func:`invert` or :func:`record_noise`; None for any other start.

    Returns:
        Pixels in [0, 1], ``[B, 3, H, W]``.
    """
    batch = len(seeds)
    guided = null is not None and config.guidance_scale > 1
    arguments: dict[str, Any] = conditioning_kwargs(base, conditioning, null.expand(batch) if null is not None and guided else None) | {
        "guidance_scale": pipeline_guidance(base, config, guided),
        "num_inference_steps": config.steps,
        "eta": config.ddim_eta,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    if config.start == "image":
        pipe = sampling_pipeline(base, config, "image2image")
        if base.architecture.vae["latent_channels"] == 4:
            image = base.encode_image(canvas.pixels).to(base.runtime.dtype)
        else:  # pipelines recognise latents by their 4 channels, and encode any other input
            image = canvas.pixels / 2 + 0.5
        arguments |= {"image": image.expand(batch, -1, -1, -1), "strength": config.strength}
    else:
        start_latents = None
        if noise is None:
            pipe = sampling_pipeline(base, config, "text2image")
        else:
            pipe: Any = base.pipeline("text2image", NoiseReplayer if config.ddim_eta else DDIMScheduler)
            start_latents, *pipe.scheduler.added = (torch.cat(parts) for parts in zip(*noise, strict=True))
        arguments |= {"height": canvas.pixels.shape[2], "width": canvas.pixels.shape[3], "latents": start_latents}
    arguments |= rescale_kwargs(pipe, config, guided)
    if config.ddim_eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        got = f"ddim_eta {config.ddim_eta:g} with scheduler {type(pipe.scheduler).__name__}"
        raise ImagicError(got, "a scheduler with an eta parameter, such as DDIMScheduler", "set ddim_eta to 0")
    return (base.decode(sample_latents(base, pipe, arguments)) / 2 + 0.5).clamp(0, 1)
