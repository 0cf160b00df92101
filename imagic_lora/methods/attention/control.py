"""The change of attention by Prompt-to-Prompt (arXiv 2208.01626): the target attends as the source does."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...bases.base import Base
from ...sampling.attention import AttentionEdit, Layer
from ..method import EditRequest
from ..sampled import SamplingConfig
from .blend import LocalBlend
from .words import Alignment, Prompt, Rule, aligned


class ControlConfig(SamplingConfig):
    """Settings of Prompt-to-Prompt, with the defaults of the official notebook for null-text inversion."""

    edit: Rule = "refine"
    """How the prompts are aligned. refine: tokens that both prompts have share their attention, new ones keep their own. replace: word by
    word, for prompts of the same number of words; a new word takes the attention of the one that it replaces."""
    cross_steps: float = Field(default=0.8, ge=0, le=1)
    """Share of the steps during which cross-attention is that of the source. A lower value allows larger changes of shape."""
    word_steps: dict[str, float] = Field(default_factory=dict)
    """Share of the steps for single words of the target prompt, in place of cross_steps."""
    self_steps: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps during which self-attention is that of the source. A lower value allows larger changes of shape."""
    self_size: int = Field(default=32, ge=1, le=1024)
    """Side of the largest map of self-attention that is changed, in positions of the latents. The first notebook of the authors uses 16."""
    factors: dict[str, float] = Field(default_factory=dict)
    """Factors of the attention to words of the target prompt (reweighting): above 1 a word counts more, below 1 less."""
    source_blend: tuple[str, ...] = ()
    """Words of the source prompt that name what may change (local blend). Without them the whole image may."""
    target_blend: tuple[str, ...] = ()
    """Words of the target prompt that name what may change. They belong to source_blend."""
    blend_factor: float = Field(default=1.0, ge=0, le=100)
    """Factor of the attention to the words of target_blend that have no factor of their own."""
    blend_threshold: float = Field(default=0.3, ge=0, lt=1)
    """Share of the largest attention to the words above which a position may change."""
    blend_start: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps before the first local blend."""

    @model_validator(mode="after")
    def _is_complete(self) -> ControlConfig:
        if bool(self.source_blend) != bool(self.target_blend):
            raise ValueError("source_blend and target_blend, or neither")
        for word, share in self.word_steps.items():
            if not 0 <= share <= 1:
                raise ValueError(f"word_steps between 0 and 1 for {word!r}, not {share:g}")
        for word, factor in self.factors.items():
            if not -100 <= factor <= 100:
                raise ValueError(f"factors between -100 and 100 for {word!r}, not {factor:g}")
        return self


class AttentionControl(AttentionEdit):
    """Gives the target the attention of the source, in passes whose last two samples are source and target at their prompts.

    Cross-attention: ``A_t <- c (A_s R + own A_t)`` for the alignment ``R`` and the factors ``c``, for each token up to a step of its own.
    Self-attention: ``A_t <- A_s``, up to a step, in layers that are not too large. All other samples are left alone.

    Args:
        alignment: alignment of the prompts.
        factors: factor of the attention to each token of the target prompt, ``[T]``.
        cross_steps: number of steps during which the attention to each token is changed, ``[T]``.
        self_steps: number of steps during which self-attention is changed.
        self_queries: largest number of queries of a self-attention that is changed.
        blend: records the maps of cross-attention; or None.

    Attributes:
        step: number of steps that are done, which the caller sets.
    """

    def __init__(
        self, alignment: Alignment, factors: Tensor, cross_steps: Tensor, self_steps: int, self_queries: int, blend: LocalBlend | None
    ) -> None:
        self.alignment, self.factors, self.cross_steps = alignment, factors, cross_steps
        self.self_steps, self.self_queries, self.blend = self_steps, self_queries, blend
        self.step = 0

    def applies(self, layer: Layer, queries: int) -> bool:
        if layer.cross:
            return self._changes_words() or (self.blend is not None and layer in self.blend.layers)
        return self.step < self.self_steps and queries <= self.self_queries

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        if not layer.cross:
            return torch.cat([probabilities[:-1], probabilities[-2:-1]])
        changed = probabilities
        if self._changes_words():
            changed = torch.cat([probabilities[:-1], self._changed(probabilities[-2], probabilities[-1])[None]])
        if self.blend:
            self.blend.record(changed[-2:], layer)
        return changed

    def _changes_words(self) -> bool:
        return self.step < int(self.cross_steps.max())

    def _changed(self, source: Tensor, target: Tensor) -> Tensor:
        """Returns the attention of the target, ``[heads, queries, T]``."""
        matrix, own, factors = (x.to(source) for x in (self.alignment.matrix, self.alignment.own, self.factors))
        edited = (source @ matrix + own * target) * factors
        return torch.where(self.step < self.cross_steps.to(source.device), edited, target)


def control(base: Base, request: EditRequest, config: ControlConfig, steps: int) -> AttentionControl:
    """Returns the change of attention for a request. It uses the tokenizer of the base and no model.

    Args:
        base: the base.
        request: the request, with a source prompt.
        config: the settings.
        steps: number of steps that are sampled.

    Raises:
        ImagicError: a word is not in its prompt, edit ``replace`` has prompts of different numbers of words, or the U-Net has no
            cross-attention that can localise words.
    """
    assert request.source_prompt is not None
    source, target = (Prompt(text, base.tokenize(text)) for text in (request.source_prompt, request.target_prompt))
    length = base.architecture.conditioning["tokens"][1]
    factors, cross_steps = torch.ones(length), torch.full((length,), int(config.cross_steps * (steps + 1)))
    for word in config.target_blend:
        factors[target.positions(word)] = config.blend_factor
    for word, factor in config.factors.items():
        factors[target.positions(word)] = factor
    for word, share in config.word_steps.items():
        cross_steps[target.positions(word)] = int(share * (steps + 1))
    blend = None
    if config.source_blend:
        words = torch.zeros(2, length)
        for row, (prompt, blended) in enumerate(((source, config.source_blend), (target, config.target_blend))):
            words[row, [position for word in blended for position in prompt.positions(word)]] = 1
        blend = LocalBlend(base, words, config.blend_threshold, int(config.blend_start * steps))
    alignment = aligned(config.edit, source, target, length)
    return AttentionControl(alignment, factors, cross_steps, int(config.self_steps * steps), config.self_size**2, blend)
