"""The structure distance of two pictures: how the self-similarities of their DINO keys differ (Tumanyan et al. 2022, arXiv 2201.00424)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ...sampling.sweeps.metrics import VisionModel

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Structure:
    """The distance by one ViT of DINO (arXiv 2104.14294).

    Args:
        network: a ``ViTModel`` of transformers.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    @classmethod
    def load(cls, source: str, offline: bool) -> Structure:
        """Loads the model; arguments and errors as those of :meth:`VisionModel.load`."""
        return cls(VisionModel.load("--model dino:", source, "vit", offline).network)

    @torch.no_grad()
    def similarities(self, pixels: Tensor, as_published: bool) -> Tensor:
        """Returns the cosine similarities of the keys of the last layer, heads concatenated, class token included: ``[T, T]``.

        The picture is scaled to the size that the network was trained at, and normalised by the mean and deviation of ImageNet.

        Args:
            pixels: a square picture, ``[1, 3, S, S]`` in [0, 1].
            as_published: as PIE-Bench does: values of 0 to 255 are normalised as if they were 0 to 1, and are scaled by the nearest four
                pixels; otherwise the bilinear filter grows with the scale.
        """
        size = self.network.config.image_size
        scaled = interpolate(pixels * 255 if as_published else pixels, (size, size), mode="bilinear", antialias=not as_published)
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        keys: list[Tensor] = []
        layer = self.network.layers[-1].attention.k_proj
        hook = layer.register_forward_hook(lambda module, inputs, output: keys.append(output[0]))
        try:
            self.network(pixel_values=(scaled - mean) / std)
        finally:
            hook.remove()
        unit = normalize(keys[0], dim=-1)
        return unit @ unit.T

    def distance(self, edited: Tensor, source: Tensor, as_published: bool) -> float:
        """Returns the mean squared difference of the similarities of two pictures, ``[1, 3, S, S]`` in [0, 1]."""
        first, second = (self.similarities(pixels, as_published) for pixels in (edited, source))
        return (first - second).square().mean().item()
