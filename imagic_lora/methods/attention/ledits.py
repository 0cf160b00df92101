"""LEDITS++ (arXiv 2311.16711) with DDIM steps: concepts are added to, or removed from, the inverted photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...core.errors import ImagicError
from ...sampling.attention import AttentionEdit, Layer, coarsest_cross_layers, map_bytes, map_size, tapped, word_maps
from ...sampling.checks import check_prompt
from ...sampling.trajectory import Step, predictions
from ..inversions.edit_friendly import EditFriendly, EditFriendlyConfig
from ..inversions.inverted import Inverted
from ..masks import mask_image
from ..method import EditRequest, Load, Passes
from ..sampled import EncodedRequest, SamplingConfig, SamplingMethod


class LEditsConfig(SamplingConfig):
    """Settings of LEDITS++, with the defaults of diffusers' pipeline for Stable Diffusion."""

    steps: int = Field(default=30, ge=1, le=1000)
    """Number of sampling steps that are done. Those that are skipped come on top."""
    guidance_scale: float = Field(default=5.0, ge=1, le=50)
    """Scale of the guidance towards each concept. The authors use 7 to 10 for many edits."""
    skip: float = Field(default=0.15, ge=0, le=1)
    """Number of steps that are left out at the noisy end, as a share of the steps that are done. A higher value keeps more of the photo."""
    add: tuple[str, ...] = ()
    """Concepts to add, such as "a hat". Without add and remove the target prompt is the one concept."""
    remove: tuple[str, ...] = ()
    """Concepts to remove, such as "glasses"."""
    threshold: float = Field(default=0.9, ge=0, lt=1)
    """Share of the image that each mask of a concept leaves out. A lower value, such as 0.75, allows larger changes."""
    intersect_below: int = Field(default=800, ge=0, le=10_000)
    """Timestep from which on the mask of a concept is the intersection of both kinds. Above it is that of the attention alone."""

    def concepts(self, target_prompt: str) -> list[tuple[str, float]]:
        """Returns the concepts with the sign of their guidance."""
        return [(text, 1.0) for text in self.add] + [(text, -1.0) for text in self.remove] or [(target_prompt, 1.0)]


@dataclass(frozen=True)
class Concept:
    """A concept of an edit.

    Args:
        conditioning: conditioning of its text.
        words: 1 for the tokens of its text, 0 for the start token, the end token and padding, ``[T]``.
        sign: 1 to add it, -1 to remove it.
    """

    conditioning: Conditioning
    words: Tensor
    sign: float


class LEdits(SamplingMethod[LEditsConfig]):
    """LEDITS++ (arXiv 2311.16711) with DDIM steps in place of second-order DPM-Solver++.

    The photo is inverted by edit-friendly inversion with the empty prompt. The edit adds, for each concept, guidance inside a mask: where
    the U-Net attends to its words, and where its prediction differs most from that of the empty prompt. The method reads concepts, not a
    description of the edited photo; without any, the whole target prompt is one. A source prompt has no effect, as in the official code
    by default.
    """

    name, config_class, needs_null = "ledits++", LEditsConfig, True

    def check(self, base: Base, request: EditRequest) -> None:
        """Checks the request as :meth:`Method.check`, and the concepts.

        Raises:
            ImagicError: also if a concept is empty, or the U-Net has no cross-attention that can localise words.
        """
        super().check(base, request)
        coarsest_cross_layers(base)
        for config in self.configs.values():
            for text, _ in config.concepts(request.target_prompt):
                check_prompt(text)
                if not word_tokens(base, text).any():
                    raise ImagicError(f"the concept {text!r}, which has no tokens", "a concept of at least one token", "change the concept")

    def sample(self, encoded: EncodedRequest, config: LEditsConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        recording = EditFriendlyConfig(steps=_total(config), skip=_total(config) - config.steps, source_guidance_scale=1.0)
        inverted = EditFriendly().invert(replace(encoded, source=None), recording)
        concepts = [
            Concept(encoded.encode_prompt(text), word_tokens(encoded.base, text), sign)
            for text, sign in config.concepts(encoded.request.target_prompt)
        ]
        guidance = ConceptGuidance(inverted, concepts, config)
        image = encoded.image(guidance.edited())
        return image, {"mask": mask_image(encoded.canvas, guidance.masks())}

    def passes_with(self, base: Base, config: LEditsConfig) -> Passes:
        return Passes(config.steps * (2 + len(config.concepts("any"))))

    def load_with(self, base: Base, config: LEditsConfig) -> Load:
        samples = 1 + len(config.concepts("any"))
        return Load(samples, maps=map_bytes(base, samples, 0))


class ConceptGuidance(AttentionEdit):
    """Samples an inverted photo with guidance towards concepts. As an edit of attention it reads the maps of their words.

    Args:
        inverted: the inverted photo.
        concepts: the concepts.
        config: the settings.
    """

    def __init__(self, inverted: Inverted, concepts: Sequence[Concept], config: LEditsConfig) -> None:
        self.inverted, self.concepts, self.config = inverted, concepts, config
        self.layers = coarsest_cross_layers(inverted.base)
        self._words = torch.stack([concept.words for concept in concepts])
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []

    def applies(self, layer: Layer, queries: int) -> bool:
        return layer in self.layers

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        self._maps.append(word_maps(probabilities[1:], self._words.to(probabilities.device)))
        return probabilities

    def edited(self) -> Tensor:
        """Returns the clean latents of the edit, ``[1, C, h, w]``."""
        inverted = self.inverted
        latents = inverted.path[inverted.start]
        with tapped(inverted.base, self):
            for step in inverted.trajectory.forwards(latents, self.prediction, inverted.start):
                latents = step.latents = step.latents + (inverted.added or {})[step.index]
        return latents

    def prediction(self, latents: Tensor, step: Step) -> Tensor:
        """Returns ``n + sum of sign scale M_c (c - n)`` for the predictions ``n`` of the empty prompt and ``c`` of the concepts.

        Args:
            latents: ``[1, C, h, w]``.
            step: the step.
        """
        self._maps.clear()
        prompts = (concept.conditioning for concept in self.concepts)
        guided, *predicted = predictions(self.inverted.base, latents, step.timestep, self.inverted.nulls[step.index], *prompts)
        null, maps = guided, torch.stack(self._maps).mean(0)
        used = []
        for concept, prediction, attention in zip(self.concepts, predicted, maps.split(1), strict=True):
            term = concept.sign * self.config.guidance_scale * (prediction - null)
            mask = self.mask(term, attention, step.timestep)
            guided = guided + mask * term
            used.append(mask)
        self._masks.append(torch.cat(used).amax(0, keepdim=True))
        return guided

    def mask(self, term: Tensor, attention: Tensor, timestep: float) -> Tensor:
        """Returns the mask of a concept, ``[1, 1, h, w]``: 1 where its guidance acts, 0 elsewhere.

        Args:
            term: its guidance, ``[1, C, h, w]``.
            attention: map of the attention to its words, ``[1, queries]``.
            timestep: timestep of the step.
        """
        size = map_size(term, self.layers[0].level)
        words = largest(smoothed(attention.unflatten(1, size)[:, None]), self.config.threshold)
        mask = interpolate(words.to(term), term.shape[2:])
        if timestep <= self.config.intersect_below:
            mask = mask * largest(term.abs().sum(1, keepdim=True), self.config.threshold)
        return mask

    def masks(self) -> Tensor:
        """Returns the share of the steps in which guidance acted at each position, ``[1, 1, h, w]``."""
        return torch.cat(self._masks).mean(0, keepdim=True)


def largest(values: Tensor, share: float) -> Tensor:
    """Returns 1 for values from a quantile on and 0 below it.

    Args:
        values: ``[1, 1, h, w]``.
        share: the quantile, in [0, 1).
    """
    return (values >= values.float().quantile(share)).to(values)


def smoothed(maps: Tensor) -> Tensor:
    """Smoothes maps ``[1, 1, h, w]`` with the 3 x 3 kernel of the official code, ``exp(-x^2 - y^2)``, normalised."""
    weights = torch.tensor([-1.0, 0.0, 1.0]).square().neg().exp()
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    mode = "reflect" if min(maps.shape[2:]) > 1 else "replicate"
    return conv2d(pad(maps, (1, 1, 1, 1), mode=mode), kernel.to(maps)[None, None])


def word_tokens(base: Base, text: str) -> Tensor:
    """Returns 1 for the tokens of a text, and 0 for the start token, the end token and padding, ``[T]``."""
    words = torch.zeros(base.architecture.conditioning["tokens"][1])
    words[1 : len(base.tokenize(text)) - 1] = 1
    return words


def _total(config: LEditsConfig) -> int:
    return int(config.steps * (1 + config.skip))
