"""Blended latent diffusion (arXiv 2206.02779): an edit inside a given mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from pydantic import Field
from torch import Tensor

from ..bases.base import Base
from ..sampling.trajectory import Trajectory, guided
from .masks import binary, latent_mask, sampled_inside
from .method import Passes
from .sampled import EncodedRequest, SamplingConfig, SamplingMethod, guided_passes


class BlendedConfig(SamplingConfig):
    """Settings of blended latent diffusion, with the defaults of the official code for Stable Diffusion 2.1."""

    strength: float = Field(default=0.75, gt=0, le=1)
    """Noise level that sampling starts from, as a share of the sampling steps. A lower value keeps more of the photo inside the mask."""
    new_noise: bool = True
    """Whether the photo outside the mask is noised anew at each noise level, as in the official code, or with one noise for all levels, as
    in diffusers' inpainting pipelines."""
    paste: bool = True
    """Whether the pixels outside the mask are those of the photo. Otherwise they are encoded and decoded by the VAE, without an edge at
    the border of the mask."""


class BlendedLatentDiffusion(SamplingMethod[BlendedConfig]):
    """Blended latent diffusion (arXiv 2206.02779): the target prompt is sampled inside a mask, the noised photo is kept outside.

    ``z <- m z + (1 - m) B`` at each noise level, where ``B`` is the photo noised to the level of ``z``, and at the end the photo. It needs
    no inpainting model: it works with every text-to-image base. Two slips of the official script for Stable Diffusion 2.1 are not
    repeated: here sampling starts from the noised photo, and ``B`` has the level that ``z`` has after the step. The reconstruction of the
    background by tuning the decoder and the choice among several images by CLIP are left out.
    """

    name, config_class, needs_null = "blended-latent", BlendedConfig, True
    requires = frozenset({"mask"})

    def sample(self, encoded: EncodedRequest, config: BlendedConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        mask = encoded.request.mask
        assert mask is not None
        image = encoded.image(blended(encoded, config, latent_mask(encoded.base.architecture, mask).to(encoded.clean)))
        return (Image.composite(image, encoded.request.photo, binary(mask)) if config.paste else image), {}

    def check_config(self, base: Base, config: BlendedConfig) -> None:
        Trajectory(base, config.steps).position(config.strength)

    def passes_with(self, base: Base, config: BlendedConfig) -> Passes:
        return Passes(int(config.steps * config.strength) * guided_passes(config.guidance_scale))


def blended(encoded: EncodedRequest, config: BlendedConfig, mask: Tensor) -> Tensor:
    """Returns the clean latents of the edit inside a mask, ``[1, C, h, w]``.

    Args:
        encoded: the request.
        config: the settings.
        mask: ``[1, 1, h, w]``: 1 may change, 0 may not.

    Raises:
        ImagicError: the strength leaves no sampling step.
    """
    trajectory, clean = Trajectory(encoded.base, config.steps), encoded.clean
    start, noise = trajectory.position(config.strength), encoded.noise(config.steps if config.new_noise else 1)

    def photo(position: int) -> Tensor:
        return trajectory.noised(clean, noise[[(position - start) % len(noise)]], position)

    predict = guided(encoded.base, encoded.target, encoded.null, config.guidance_scale)
    return sampled_inside(trajectory, predict, mask, photo, start)
