"""Stage 3 on a flow base: Euler's method over the levels of noise, from noise to image and back (arXiv 2209.03003).

The loop and the arithmetic of a step are those of :class:`~imagic_lora.sampling.flow_trajectory.FlowTrajectory`; this module has the
starts.

No pipeline of diffusers is used: of its flow families some have no image-to-image, none can be inverted, and guidance differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .flow_trajectory import FlowTrajectory
from .guidance import guided
from .trajectory import Predict, Step, last


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
        height, width = (side // base.architecture.vae_scale_factor for side in canvas.pixels.shape[2:])
        self.trajectory = FlowTrajectory(base, config.steps, height * width, config.ddim_eta)
        self.base, self.config, self.canvas = base, config, canvas
        self.null = null if config.guidance_scale > 1 else None
        self._shape = (base.architecture.latent_channels, height, width)
        photo = base.encode_image(canvas.pixels) if config.start != "noise" or config.reference else None
        self._clean = None if config.start == "noise" else photo
        self._reference = photo if config.reference else None
        self._completed = cache(self._with_reference)  # one object for each conditioning: the inversions are kept by their conditioning
        self.null = self.null and self._completed(self.null)
        invert = self.recorded if config.ddim_eta else self.inverted
        self._inversion: Callable[[Conditioning, int], tuple[Tensor, ...]] = cache(lambda source, seed: invert(source, [seed]))

    @torch.no_grad()
    def latents(self, conditionings: Sequence[Conditioning], seeds: Sequence[int], sources: Sequence[Conditioning]) -> Tensor:
        """Returns the latents ``[B, C, h, w]`` of a batch of images.

        Args:
            conditionings: of each image.
            seeds: of each image.
            sources: conditionings of the photo, for each image.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        conditionings, sources = ([self._completed(one) for one in group] for group in (conditionings, sources))
        start = self._start(generators, seeds, sources)
        latents, predict = start.latents, self._velocity(concatenate(list(conditionings)), self.null)
        if self.config.start == "flow":
            predict = self._difference(predict, generators, concatenate(list(sources)))
        for step in self.trajectory.forwards(latents, predict, start.position):
            if start.added:
                step.latents = step.latents + start.added[step.index - start.position]
            elif std := self.trajectory.standard_deviation(step.index):
                step.latents = step.latents + std * self._noise(generators)
            latents = step.latents
        return latents

    def _start(self, generators: list[torch.Generator], seeds: Sequence[int], sources: Sequence[Conditioning]) -> Start:
        config = self.config
        if config.start == "inverted":
            found = [self._inversion(source, seed) for source, seed in zip(sources, seeds, strict=True)]
            latents, *added = (torch.cat(parts) for parts in zip(*found, strict=True))
            return Start(latents, 0, added or None)
        if self._clean is None:
            return Start(self._noise(generators), 0)
        position = self.trajectory.position(config.strength)
        if config.start == "flow":
            return Start(self._clean.expand(len(seeds), *self._shape), position)
        noise = self._noise(generators)
        return Start(self.trajectory.noised(self._clean, noise, position), position)

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal noise ``[B, C, h, w]``, drawn on the CPU: that of an image depends only on its seed."""
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in generators]).to(self.base.runtime.device)

    def _with_reference(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning, with the photo as a reference image if the settings say so."""
        return conditioning if self._reference is None else self.base.with_reference(conditioning, self._reference)

    def _velocity(self, conditioning: Conditioning, null: Conditioning | None) -> Predict:
        """The prediction of a step, guided as the settings say."""
        config = self.config
        return lambda latents, step: velocity(
            self.base, latents, step.timestep, conditioning, null, config.guidance_scale, config.guidance_rescale
        )

    def _difference(self, predict: Predict, generators: Sequence[torch.Generator], source: Conditioning) -> Predict:
        """The prediction of a step from the photo: the velocity for the edit without that for the photo, both guided."""
        assert self._clean is not None
        clean, away = self._clean, self._velocity(source, self.null)
        return lambda latents, step: difference(self.trajectory, clean, self._noise(generators), predict, away)(latents, step)

    def inverted(self, source: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """The noise from which Euler's method without guidance reproduces the photo, ``[1, C, h, w]``: its steps backwards.

        Args:
            source: conditioning of the photo, or of each photo of a batch.
            seeds: one for each photo; they have no effect.
        """
        assert self._clean is not None
        return (last(self._clean, self.trajectory.backwards(self._clean, self._velocity(source, None))),)

    def recorded(self, source: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """The noise of every step with which the photo is reproduced: edit-friendly inversion (arXiv 2304.06140) with the steps of a flow.

        The photo is noised to every level, each with independent noise. What a step adds is the difference between the latents of the next
        level and the mean that the denoiser predicts for them.

        Args:
            source: conditioning of the photo, or of each photo of a batch.
            seeds: one for each photo.

        Returns:
            The latents before the first step, then the noise that each step adds, all ``[1, C, h, w]``.
        """
        assert self._clean is not None
        trajectory, predict = self.trajectory, self._velocity(source, None)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        path = [trajectory.noised(self._clean, self._noise(generators), position) for position in range(trajectory.steps)]
        steps = [Step(i, trajectory.timesteps[i], i, i + 1, latents, latents) for i, latents in enumerate(path)]
        means = [trajectory.moved(predict(step.before, step), step) for step in steps]
        return path[0], *(after - mean for after, mean in zip([*path[1:], self._clean], means, strict=True))


def velocity(
    base: Base,
    latents: Tensor,
    sigma: float,
    conditioning: Conditioning,
    null: Conditioning | None,
    scale: float = 1.0,
    rescale: float = 0.0,
) -> Tensor:
    """Returns the guided velocity ``[B, C, h, w]``, fp32. The null conditioning is a pass of its own: it may have another length.

    Args:
        base: a flow.
        latents: ``[B, C, h, w]``.
        sigma: their level, in (0, 1].
        conditioning: with added conditions, of batch size ``B`` or 1.
        null: what guidance leads away from; None for no guidance.
        scale, rescale: as for :func:`~imagic_lora.sampling.guidance.guided`.
    """
    sigmas = torch.full((len(latents),), sigma, device=latents.device)
    with_prompt = base.predict(latents, sigmas, conditioning).float()
    if null is None:
        return with_prompt
    return guided(with_prompt, base.predict(latents, sigmas, null).float(), scale, rescale)


def difference(trajectory: FlowTrajectory, clean: Tensor, noise: Tensor, towards: Predict, away: Predict) -> Predict:
    """Returns the prediction of FlowEdit (arXiv 2412.08629, equation 11), for latents that start as those of the photo.

    Photo and edit get the same noise, and the edit moves by the difference of their velocities. Where both predict the same it is exactly
    the photo.

    Args:
        trajectory: the levels.
        clean: latents of the photo, ``[1, C, h, w]``.
        noise: of the step, ``[B, C, h, w]``.
        towards, away: predict the velocity for the edit and for the photo.
    """

    def predict(latents: Tensor, step: Step) -> Tensor:
        noised = trajectory.noised(clean, noise, step.start)
        return towards(noised + (latents - clean), step) - away(noised, step)

    return predict
