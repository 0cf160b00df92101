"""Local blend of Prompt-to-Prompt (arXiv 2208.01626): only the area of some words may change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ...bases.base import Base
from ...sampling.attention import Layer, coarsest_cross_layers, map_size, word_maps


class LocalBlend:
    """Collects where source and target attend to some words, and keeps the source elsewhere.

    The attention to the words at the coarsest maps is summed over all steps so far. Positions above a share of the maximum, of the source
    or of the target, may change. The maps of the target are those after Prompt-to-Prompt has changed them, as in the official code.

    Args:
        base: the base.
        words: 1 for the tokens of the words, ``[2, T]``: in the source and in the target prompt.
        threshold: share of the maximum, in [0, 1).
        start: number of steps before the first blend.
    """

    def __init__(self, base: Base, words: Tensor, threshold: float, start: int) -> None:
        self.layers, self.words, self.threshold, self.start = coarsest_cross_layers(base), words, threshold, start
        self._maps: Tensor | None = None

    def record(self, probabilities: Tensor, layer: Layer) -> None:
        """Adds the maps of a layer, if it is one of the coarsest.

        Args:
            probabilities: of source and target, ``[2, heads, queries, T]``.
            layer: the layer.
        """
        if layer in self.layers:
            maps = word_maps(probabilities, self.words.to(probabilities.device))
            self._maps = maps if self._maps is None else self._maps + maps

    def mask(self, latents: Tensor) -> Tensor:
        """Returns where the target may differ, ``[1, 1, h, w]``: 1 or 0.

        Args:
            latents: of source and target, ``[2, C, h, w]``.
        """
        assert self._maps is not None, "the mask needs a pass through the tapped denoiser"
        maps = self._maps.unflatten(1, map_size(latents, self.layers[0].level))[:, None]
        maps = interpolate(max_pool2d(maps, 3, stride=1, padding=1), latents.shape[2:])
        inside = maps > self.threshold * maps.amax((2, 3), keepdim=True)
        return inside.any(0, keepdim=True).to(latents)

    def blended(self, latents: Tensor, steps: int) -> Tensor:
        """Returns the latents ``[2, C, h, w]`` of source and target, the target equal to the source outside the mask.

        Args:
            latents: of source and target after a step, ``[2, C, h, w]``.
            steps: number of steps that are done.
        """
        if steps <= self.start:
            return latents
        source, target = latents.split(1)
        return torch.cat([source, torch.where(self.mask(latents) > 0, target, source)])
