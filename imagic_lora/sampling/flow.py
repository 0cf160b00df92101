"""Stage 3 on a flow base: Euler's method over the levels of noise, from noise to image and back (arXiv 2209.03003).

A sampling of ``N`` steps has the levels ``s_0 = 1 > s_1 > ... > s_N = 0``. Step ``i`` leads from ``s_i`` to ``s_{i+1}`` with the velocity
at ``s_i``. An inversion takes the steps backwards, each with the velocity at the same level, on the latents of its cleaner end.

No pipeline of diffusers is used: of its flow families some have no image-to-image, none can be inverted, and guidance differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import Base
from ..bases.process import Flow
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..photos.canvas import Canvas
from .guidance import guided


class Start(NamedTuple):
    """Where a sampling starts.

    Args:
        latents: ``[B, C, h, w]`` fp32.
        position: number of the first step.
        added: noise that each remaining step adds, next step first; None to draw it.
    """

    latents: Tensor
    position: int
    added: list[Tensor] | None = None


class FlowSampler:
    """Samples batches of latents. Arguments as for :func:`~imagic_lora.sampling.generate.generate`.

    Raises:
        ImagicError: the base is not a flow.
    """

    def __init__(self, base: Base, config: EditConfig, canvas: Canvas, null: Conditioning | None) -> None:
        if not isinstance(base.process, Flow):
            raise ImagicError(f"Euler steps of a flow on {base.name}", "a flow base", "choose another base")
        self.base, self.config, self.canvas = base, config, canvas
        self.null = null if config.guidance_scale > 1 else None
        height, width = (side // base.architecture.vae_scale_factor for side in canvas.pixels.shape[2:])
        self._shape = (base.architecture.latent_channels, height, width)
        self.sigmas: list[float] = base.process.sigmas(config.steps, height * width).tolist()
        self._clean = None if config.start == "noise" else base.encode_image(canvas.pixels)
        self._inversion = cache(self._recorded if config.ddim_eta else self._inverted)

    @torch.no_grad()
    def latents(self, conditionings: Sequence[Conditioning], seeds: Sequence[int], sources: Sequence[Conditioning]) -> Tensor:
        """Returns the latents ``[B, C, h, w]`` of a batch of images.

        Args:
            conditionings: of each image.
            seeds: of each image.
            sources: conditionings of the photo, for each image.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = self._start(generators, seeds, sources)
        latents, conditioning = start.latents, concatenate(list(conditionings))
        for number, index in enumerate(range(start.position, self.config.steps)):
            latents, std = self._mean(latents, index, conditioning, self.null)
            if start.added:
                latents = latents + start.added[number]
            elif std:
                latents = latents + std * self._noise(generators)
        return latents

    def _start(self, generators: list[torch.Generator], seeds: Sequence[int], sources: Sequence[Conditioning]) -> Start:
        config = self.config
        if config.start == "inverted":
            found = [self._inversion(source, seed) for source, seed in zip(sources, seeds, strict=True)]
            latents, *added = (torch.cat(parts) for parts in zip(*found, strict=True))
            return Start(latents, 0, added or None)
        noise = self._noise(generators)
        if self._clean is None:
            return Start(noise, 0)
        position = config.steps - int(config.steps * config.strength)
        return Start(self._noised(self._clean, noise, position), position)

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal noise ``[B, C, h, w]``, drawn on the CPU: that of an image depends only on its seed."""
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in generators]).to(self.base.runtime.device)

    def _noised(self, clean: Tensor, noise: Tensor, position: int) -> Tensor:
        return self.base.noised(clean, noise, torch.full((len(noise),), self.sigmas[position], device=noise.device))

    def _velocity(self, latents: Tensor, index: int, conditioning: Conditioning, null: Conditioning | None) -> Tensor:
        """The guided velocity ``[B, C, h, w]`` fp32 at the level of a step; the null conditioning is a pass of its own."""
        sigma = torch.full((len(latents),), self.sigmas[index], device=latents.device)
        with_prompt = self.base.predict(latents, sigma, conditioning).float()
        if null is None:
            return with_prompt
        without = self.base.predict(latents, sigma, null).float()
        return guided(with_prompt, without, self.config.guidance_scale, self.config.guidance_rescale)

    def _mean(self, latents: Tensor, index: int, conditioning: Conditioning, null: Conditioning | None) -> tuple[Tensor, float]:
        """Takes a step without its noise.

        With ``ddim_eta`` 0 this is Euler's step. Otherwise a share of the noise in the latents is replaced: the standard deviation of the
        new noise is ``ddim_eta`` times that of the ancestral step, ``s' sqrt(1 - ((1 - s) s' / ((1 - s') s))^2)``. It is that of DDIM
        (arXiv 2010.02502, equation 16) for signal ``1 - s`` and noise ``s``.

        Returns:
            The mean of the next latents, and the standard deviation of the noise to add.
        """
        now, after = self.sigmas[index], self.sigmas[index + 1]
        velocity = self._velocity(latents, index, conditioning, null)
        if not self.config.ddim_eta or not after:
            return latents + (after - now) * velocity, 0.0
        std = self.config.ddim_eta * after * math.sqrt(1 - ((1 - now) * after / ((1 - after) * now)) ** 2)
        clean, noise = latents - now * velocity, latents + (1 - now) * velocity
        return (1 - after) * clean + math.sqrt(after**2 - std**2) * noise, std

    def _inverted(self, source: Conditioning, seed: int) -> tuple[Tensor, ...]:
        """The noise from which Euler's method without guidance reproduces the photo, ``[1, C, h, w]``: its steps backwards."""
        assert self._clean is not None
        latents = self._clean
        for index in reversed(range(self.config.steps)):
            latents = latents + (self.sigmas[index] - self.sigmas[index + 1]) * self._velocity(latents, index, source, None)
        return (latents,)

    def _recorded(self, source: Conditioning, seed: int) -> tuple[Tensor, ...]:
        """The noise of every step with which the photo is reproduced: edit-friendly inversion (arXiv 2304.06140) with the steps of a flow.

        The photo is noised to every level, each with independent noise. What a step adds is the difference between the latents of the next
        level and the mean that the denoiser predicts for them.

        Returns:
            The latents before the first step, then the noise that each step adds, all ``[1, C, h, w]``.
        """
        assert self._clean is not None
        generator = torch.Generator().manual_seed(seed)
        path = [self._noised(self._clean, self._noise([generator]), position) for position in range(self.config.steps)]
        means = [self._mean(latents, index, source, None)[0] for index, latents in enumerate(path)]
        return path[0], *(after - mean for after, mean in zip([*path[1:], self._clean], means, strict=True))
