"""Stage 3 on a base with a diffusion process: latents of images through the pipelines and schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .inversion import NoiseReplayer, invert, record_noise
from .pipelines import check_ddim_eta, conditioning_kwargs, pipeline_guidance, rescale_kwargs, sample_latents, sampling_pipeline


class DiffusionSampler:
    """Samples batches of latents. Arguments as for :func:`~imagic_lora.sampling.generate.generate`."""

    def __init__(self, base: Base, config: EditConfig, canvas: Canvas, null: Conditioning | None) -> None:
        self.base, self.config, self.canvas, self.null = base, config, canvas, null
        self._inversion: Callable[[Conditioning, int], tuple[Tensor, ...]] | None = None
        if config.start == "inverted":
            clean = base.encode_image(canvas.pixels)
            self._inversion = cache(partial(record_noise if config.ddim_eta else invert, base, canvas, clean, config))

    def latents(self, conditionings: Sequence[Conditioning], seeds: Sequence[int], sources: Sequence[Conditioning]) -> Tensor:
        """Returns the latents ``[B, C, h, w]`` of a batch of images.

        Args:
            conditionings: of each image.
            seeds: of each image.
            sources: conditionings of the photo, for each image.

        Raises:
            ImagicError: the scheduler does not support ``ddim_eta``, or the pipeline has no ``guidance_rescale``.
        """
        base, config, canvas = self.base, self.config, self.canvas
        batch, conditioning = len(seeds), concatenate(list(conditionings))
        noise = [self._inversion(source, seed) for source, seed in zip(sources, seeds, strict=True)] if self._inversion else None
        guided = self.null is not None and config.guidance_scale > 1
        null = self.null.expand(batch) if self.null is not None and guided else None
        arguments: dict[str, Any] = conditioning_kwargs(base, conditioning, null) | {
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
        check_ddim_eta(pipe.scheduler, config)
        return sample_latents(base, pipe, arguments)
