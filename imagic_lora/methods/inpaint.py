"""Inpainting by a model that was trained for it (arXiv 2112.10752, section 4.5): an edit inside a given mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from pydantic import Field
from torch import Tensor

from ..bases.base import Base
from ..sampling.trajectory import Trajectory, guided, last
from .masks import binary
from .method import Passes
from .sampled import EncodedRequest, SamplingConfig, SamplingMethod, guided_passes


class InpaintConfig(SamplingConfig):
    """Settings of inpainting, with the defaults of diffusers' StableDiffusionInpaintPipeline."""

    strength: float = Field(default=1.0, gt=0, le=1)
    """Noise level that sampling starts from, as a share of the sampling steps. 1: nothing of the photo is kept inside the mask."""
    paste: bool = True
    """Whether the pixels outside the mask are those of the photo. Otherwise they are encoded and decoded by the VAE, without an edge at
    the border of the mask."""


class Inpaint(SamplingMethod[InpaintConfig]):
    """Inpainting: a model that was trained to fill a mask samples the target prompt inside it, and sees the photo around it.

    In each step the U-Net gets the noisy latents, the mask, and the latents of the photo whose pixels inside the mask are grey, one after
    the other along the channels, as in diffusers' StableDiffusionInpaintPipeline. A base without these inputs edits inside a mask by
    blended latent diffusion.
    """

    name, config_class, needs_null = "inpaint", InpaintConfig, True
    requires = frozenset({"mask"})
    supports = frozenset({"inpainting U-Net"})

    def sample(self, encoded: EncodedRequest, config: InpaintConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        mask = encoded.request.mask
        assert mask is not None
        image = encoded.image(inpainted(encoded, config))
        return (Image.composite(image, encoded.request.photo, binary(mask)) if config.paste else image), {}

    def check_config(self, base: Base, config: InpaintConfig) -> None:
        Trajectory(base, config.steps).position(config.strength)

    def passes_with(self, base: Base, config: InpaintConfig) -> Passes:
        return Passes(int(config.steps * config.strength) * guided_passes(config.guidance_scale))


def inpainted(encoded: EncodedRequest, config: InpaintConfig) -> Tensor:
    """Returns the clean latents of the edit, ``[1, C, h, w]``.

    Args:
        encoded: the request; its conditionings have the masked photo.
        config: the settings.

    Raises:
        ImagicError: the strength leaves no sampling step.
    """
    trajectory, noise = Trajectory(encoded.base, config.steps), encoded.noise()
    start = trajectory.position(config.strength)
    latents = noise if config.strength == 1 else trajectory.noised(encoded.clean, noise, start)
    predict = guided(encoded.base, encoded.target, encoded.null, config.guidance_scale)
    return last(latents, trajectory.forwards(latents, predict, start))
