"""DiffEdit (arXiv 2210.11427): an edit inside a mask that the method finds by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ..bases.base import Base
from ..sampling.trajectory import Trajectory, guided, path, predictions
from .inversions.inverted import null_of, source_or_null
from .masks import latent_mask, mask_image, sampled_inside
from .method import Passes
from .sampled import EncodedRequest, SamplingConfig, SamplingMethod, guided_passes


class DiffEditMaskConfig(SamplingConfig):
    """Settings of DiffEdit in a given mask, with the default of diffusers' pipeline."""

    ratio: float = Field(default=0.8, gt=0, le=1)
    """Noise level up to which the photo is inverted, as a share of the sampling steps. A higher value allows larger edits."""


class DiffEditConfig(DiffEditMaskConfig):
    """Settings of DiffEdit, with the defaults of the paper; the limit of the map and the ratio are those of diffusers' pipeline."""

    maps: int = Field(default=10, ge=1, le=100)
    """Number of noises that the mask is averaged over."""
    mask_strength: float = Field(default=0.5, gt=0, le=1)
    """Noise level of the mask, as a share of the sampling steps."""
    mask_limit: float = Field(default=3.0, gt=0, le=100)
    """Largest difference of predictions that counts, as a multiple of their mean over the image. Larger ones are set to it."""
    mask_threshold: float = Field(default=0.5, gt=0, lt=1)
    """Share of the largest difference above which a position belongs to the mask. A lower value makes the mask larger."""


class DiffEdit(SamplingMethod[DiffEditConfig]):
    """DiffEdit (arXiv 2210.11427): the mask is where the predictions for two prompts differ; outside it the inverted photo is kept.

    1. The photo is noised several times. The mask is where the predictions for the target prompt and for the source prompt, or for the
       empty prompt if there is none, differ most.
    2. DDIM inversion with the empty prompt, up to a noise level.
    3. DDIM with the target prompt from there. After each step the latents outside the mask are those of the inversion at the same noise
       level, and at the end those of the photo.

    A mask in the request has no effect: :class:`DiffEditInMask` uses it.
    """

    name, config_class, needs_null = "diffedit", DiffEditConfig, True

    def sample(self, encoded: EncodedRequest, config: DiffEditConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        mask = found_mask(encoded, config)
        return encoded.image(edited(encoded, config, mask)), {"mask": mask_image(encoded.canvas, mask)}

    def check_config(self, base: Base, config: DiffEditConfig) -> None:
        trajectory = Trajectory(base, config.steps)
        trajectory.position(config.ratio)
        trajectory.position(config.mask_strength)

    def passes_with(self, base: Base, config: DiffEditConfig) -> Passes:
        return Passes(2 * config.maps + int(config.steps * config.ratio) * (1 + guided_passes(config.guidance_scale)))


class DiffEditInMask(SamplingMethod[DiffEditMaskConfig]):
    """DiffEdit (arXiv 2210.11427) in the mask of the request, without the search for one.

    Inside the mask the inverted photo is sampled with the target prompt, so that it keeps more of the photo than blended latent diffusion,
    which starts from a random noise.
    """

    name, config_class, needs_null = "diffedit-mask", DiffEditMaskConfig, True
    requires = frozenset({"mask"})

    def sample(self, encoded: EncodedRequest, config: DiffEditMaskConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        assert encoded.request.mask is not None
        return encoded.image(edited(encoded, config, latent_mask(encoded.base.architecture, encoded.request.mask).to(encoded.clean))), {}

    def check_config(self, base: Base, config: DiffEditMaskConfig) -> None:
        Trajectory(base, config.steps).position(config.ratio)

    def passes_with(self, base: Base, config: DiffEditMaskConfig) -> Passes:
        return Passes(int(config.steps * config.ratio) * (1 + guided_passes(config.guidance_scale)))


def found_mask(encoded: EncodedRequest, config: DiffEditConfig) -> Tensor:
    """Returns the mask, ``[1, 1, h, w]``: 1 may change, 0 may not.

    Equal prompts give an empty mask. A prediction of another type than the noise differs from that of the noise by a factor only, which
    has no effect.

    Args:
        encoded: the request.
        config: the settings.

    Raises:
        ImagicError: the strength leaves no sampling step.
    """
    trajectory = Trajectory(encoded.base, config.steps)
    position = trajectory.position(config.mask_strength)
    difference = torch.zeros_like(encoded.clean[:, :1])
    for noise in encoded.noise(config.maps).split(1):
        latents = trajectory.noised(encoded.clean, noise, position)
        source, target = predictions(encoded.base, latents, trajectory.timesteps[position], source_or_null(encoded), encoded.target)
        difference += (target - source).abs().mean(1, keepdim=True) / config.maps
    limit = difference.mean() * config.mask_limit
    return (difference.clamp(max=limit) > config.mask_threshold * limit).to(encoded.clean)


def edited(encoded: EncodedRequest, config: DiffEditMaskConfig, mask: Tensor) -> Tensor:
    """Returns the clean latents of the edit inside a mask, ``[1, C, h, w]``.

    Args:
        encoded: the request.
        config: the settings.
        mask: ``[1, 1, h, w]``: 1 may change, 0 may not.

    Raises:
        ImagicError: the ratio leaves no sampling step.
    """
    base, trajectory, null = encoded.base, Trajectory(encoded.base, config.steps), null_of(encoded)
    start = trajectory.position(config.ratio)
    inverted = path(trajectory.backwards(encoded.clean, guided(base, null), end=start))
    predict = guided(base, encoded.target, null, config.guidance_scale)
    return sampled_inside(trajectory, predict, mask, inverted.__getitem__, start)
