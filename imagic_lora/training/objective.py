"""The only denoising loss."""

from __future__ import annotations

from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.runtime import to_device


def denoising_loss(base: Base, latents: Tensor, conditioning: Conditioning, noise: Tensor, times: Tensor) -> Tensor:
    """``|| target(x0, noise, t) - f(x_t, t, e) ||^2``, the mean over a sample's elements: equation 1 of Imagic (arXiv 2210.09276).

    Args:
        latents: of the photo, ``[1, C, h, w]``.
        conditioning: for one picture; it is broadcast.
        noise: standard normal, ``[B, C, h, w]``.
        times: ``[B]`` in [0, 1), turned into the base's own timesteps.

    Returns:
        The loss of each sample, ``[B]`` fp32.
    """
    timesteps = to_device(base.timesteps(times), latents.device)
    clean = latents.expand_as(noise)
    predicted = base.predict(base.noised(clean, noise, timesteps), timesteps, conditioning)
    return (predicted.float() - base.target(clean, noise, timesteps).float()).square().flatten(1).mean(1)
