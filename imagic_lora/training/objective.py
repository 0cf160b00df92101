"""The only denoising loss."""

from __future__ import annotations

from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.runtime import to_device


def denoising_loss(base: Base, latents: Tensor, conditioning: Conditioning, noise: Tensor, times: Tensor) -> Tensor:
    """Returns ``|| target(x0, noise, t) - f(x_t, t, e) ||^2``, averaged over the elements of each sample.

    This is equation 1 of Imagic (arXiv 2210.09276).

    Args:
        latents: latents ``x0`` of the photo, ``[1, C, h, w]``.
        conditioning: conditioning ``e`` of one image; it is broadcast over the batch.
        noise: standard normal noise, ``[B, C, h, w]``.
        times: times ``u`` in [0, 1), ``[B]``; the base converts them into its own timesteps ``t``.

    Returns:
        The loss of each sample, ``[B]`` fp32.
    """
    timesteps = to_device(base.timesteps(times), latents.device)
    clean = latents.expand_as(noise)
    predicted = base.predict(base.noised(clean, noise, timesteps), timesteps, conditioning)
    return (predicted.float() - base.target(clean, noise, timesteps).float()).square().flatten(1).mean(1)
