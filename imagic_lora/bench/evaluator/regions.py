"""PSNR, SSIM and MSE of a whole picture, of its background and of the edited region."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

BEST_PSNR = 100.0
"""PSNR of equal pictures in dB, whose error is 0."""


def over(values: Tensor, region: Tensor | None) -> float:
    """Returns the mean of a map over a region.

    Args:
        values: ``[1, C, H, W]``.
        region: 1 inside and 0 outside, ``[1, 1, H, W]``, not 0 everywhere; None for the whole map.
    """
    if region is None:
        return values.double().mean().item()
    return ((values.double() * region).sum() / (region.double().sum() * values.shape[1])).item()


def pixel_measures(edited: Tensor, source: Tensor, region: Tensor | None, full_frame: bool) -> dict[str, float]:
    """Returns ``psnr`` in dB (at most 100), ``ssim`` and ``mse`` of two pictures.

    In a region, both pictures are black outside of it, and the means of the squared error and of the SSIM map (Wang et al. 2004, Gaussian
    window of 11 pixels) are those over its pixels.

    Args:
        edited, source: ``[1, 3, H, W]`` in [0, 1].
        region: 1 inside and 0 outside, ``[1, 1, H, W]``, not 0 everywhere; None for the whole picture.
        full_frame: whether means over a region divide by all pixels of the picture, as published by PIE-Bench: a smaller region then has
            better scores.
    """
    if region is not None:
        edited, source = edited * region, source * region
    where = None if full_frame else region
    mse = over((edited.double() - source.double()).square(), where)
    _, ssim_map = structural_similarity_index_measure(edited, source, data_range=1.0, return_full_image=True)
    psnr = BEST_PSNR if mse <= 10 ** (-BEST_PSNR / 10) else -10 * torch.tensor(mse, dtype=torch.float64).log10().item()
    return {"psnr": psnr, "ssim": over(ssim_map, where), "mse": mse}
