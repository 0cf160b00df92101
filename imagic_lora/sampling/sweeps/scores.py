"""Scores of edited images that need no other model than the base.

*Alignment* says how much better the denoiser explains an image under the target prompt than under the embedding of the photo. *Fidelity*
says how near an image is to the reconstruction of the photo: the edit at eta 0 with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...core.noise import noise_at
from ...core.runtime import to_device
from ...photos.canvas import to_pixels

PROBES = 8
"""Number of pairs of timestep and noise that an image is scored at. The times divide [0, 1) evenly."""


@torch.no_grad()
def denoising_errors(base: Base, latents: Tensor, conditionings: Sequence[Conditioning], batch_size: int) -> Tensor:
    """Returns how well the denoiser predicts noised images, at the same :data:`PROBES` pairs of timestep and noise for all of them.

    Args:
        base: the base, with or without an adapter applied.
        latents: latents of the images, ``[N, C, h, w]``.
        conditionings: what to predict under, each of one prompt, with added conditions.
        batch_size: number of samples in a call of the denoiser.

    Returns:
        Mean squared errors of the denoiser's prediction, ``[conditionings, N, PROBES]``, fp32, on the CPU.
    """
    times = (torch.arange(PROBES, dtype=torch.float64) + 0.5) / PROBES
    timesteps = to_device(base.timesteps(times), latents.device)
    noise = to_device(noise_at(0, "scores", 0, range(PROBES), tuple(latents.shape[1:])), latents.device)
    images, probes = (index.flatten() for index in torch.meshgrid(torch.arange(len(latents)), torch.arange(PROBES), indexing="ij"))
    errors = torch.empty(len(conditionings), len(images))
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        clean, added, at = latents[images[batch]], noise[probes[batch]], timesteps[probes[batch]]
        noised, target = base.noised(clean, added, at), base.target(clean, added, at).float()
        for k, conditioning in enumerate(conditionings):
            predicted = base.predict(noised, at, conditioning).float()
            errors[k, batch] = (predicted - target).square().flatten(1).mean(1).cpu()
    return errors.view(len(conditionings), len(latents), PROBES)


def alignment(base: Base, latents: Tensor, target: Conditioning, optimised: Conditioning, batch_size: int) -> list[float]:
    """Returns the alignment of images with the target prompt: the mean over timesteps of ``log(error(e_opt) / error(e_tgt))``.

    It is 0 where both embeddings explain an image equally well, and above 0 where the target prompt explains it better. A ratio of errors
    at one timestep is the same for every prediction type. The idea is that of diffusion classifiers (arXiv 2303.16203).

    Args:
        base: the base, for a sweep with its adapter applied: the photo is then better explained by ``e_opt``, which it was tuned with.
        latents: latents of the images, ``[N, C, h, w]``.
        target: conditioning of the target prompt, ``e_tgt``.
        optimised: conditioning optimised on the photo, ``e_opt``.
        batch_size: number of samples in a call of the denoiser.
    """
    by_target, by_optimised = denoising_errors(base, latents, [target, optimised], batch_size)
    return (by_optimised / by_target).log().mean(1).tolist()


def fidelity(latents: Tensor, reference: Tensor) -> float:
    """Returns how much of a reference an image keeps: ``1 - d^2 / 2``, with ``d`` the distance of their latents.

    ``d`` is a root mean square over elements, in standard deviations of the reference. The result is 1 for equal images, about 0 for
    unrelated images of the same contrast, and can be below 0.

    Args:
        latents: latents of the image, ``[C, h, w]``.
        reference: latents of the reference, the same shape.
    """
    return 1 - ((latents - reference).square().mean() / reference.var() / 2).item()


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Returns the structural similarity of two images of equal size, at most 1 (Wang et al. 2004)."""
    first, second = (to_pixels(picture) / 2 + 0.5 for picture in (image, reference))
    value = structural_similarity_index_measure(first, second, data_range=1.0)
    assert isinstance(value, Tensor)
    return value.item()
