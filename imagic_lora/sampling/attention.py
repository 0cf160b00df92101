"""The attention tap: reads and changes the attention probabilities of a U-Net, and restores its processors afterwards.

Prompt-to-Prompt and LEDITS++ are written as an :class:`AttentionEdit`::

    with tapped(base, edit):
        base.predict(latents, timesteps, conditioning)

Only layers for which the edit applies leave the base's own attention (PyTorch's SDPA or xformers) and compute the probabilities explicitly.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..bases.base import Base
from ..core.errors import ImagicError

_COPIES = 3  # of the probabilities in a tapped layer at its peak, by a count of every tensor (tests/methods/test_loads.py)
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")


@dataclass(frozen=True)
class Layer:
    """An attention layer of a U-Net.

    Args:
        name: name of its module in the U-Net.
        cross: whether its keys are the tokens of the prompt; otherwise they are its queries, the positions of the image.
        place: half of the U-Net, or its middle.
        level: how often height and width of the latents are halved before the layer. Its queries are the positions in row-major order.
    """

    name: str
    cross: bool
    place: Literal["down", "mid", "up"]
    level: int


class AttentionEdit(ABC):
    """A change of attention probabilities, for :func:`tapped`. An edit that only reads them returns them unchanged."""

    @abstractmethod
    def applies(self, layer: Layer, queries: int) -> bool:
        """Returns whether the edit wants the probabilities of a layer in this pass.

        Args:
            layer: the layer.
            queries: number of queries.
        """

    @abstractmethod
    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        """Returns the probabilities that the layer multiplies its values with.

        Args:
            probabilities: ``softmax(q k / sqrt(d))``, ``[B, heads, queries, keys]`` in fp32. The samples are in the order of the batch of
                the denoiser. They must not be changed in place.
            layer: the layer.
        """


class _Open:
    """Exists while a tap is open: a processor whose restoration was interrupted knows by it that its tap is closed."""

    def __init__(self, edit: AttentionEdit) -> None:
        self.edit = edit


class _TapProcessor:
    """Attention processor that passes the probabilities to an edit, or calls the original processor where the edit does not apply."""

    def __init__(self, layer: Layer, tap: ReferenceType[_Open], original: Any) -> None:
        self.layer, self.tap, self.original = layer, tap, original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        tap = self.tap()
        if tap is None or not tap.edit.applies(self.layer, hidden_states.shape[1]):
            return self.original(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, temb=temb)
        keys_from = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            keys_from = attn.norm_encoder_hidden_states(keys_from)
        projected: Any = attn.to_q(hidden_states), attn.to_k(keys_from), attn.to_v(keys_from)  # pyright: ignore[reportOptionalCall]
        query, key, value = (states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in projected)
        scores = attn.scale * query.float() @ key.float().transpose(-1, -2)  # fp16 overflows in some bases
        if attention_mask is not None:
            scores = scores + attn.prepare_attention_mask(attention_mask, keys_from.shape[1], len(scores), out_dim=4)
        probabilities = tap.edit(scores.softmax(-1).float(), self.layer)
        mixed = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for module in attn.to_out:  # pyright: ignore[reportOptionalIterable]
            mixed = module(mixed)
        return mixed / attn.rescale_output_factor


def attention_layers(base: Base) -> list[tuple[Layer, Attention]]:
    """Returns the attention layers of the transformer blocks of a U-Net, in the order of its modules.

    Args:
        base: a base with a U-Net, with or without LoRA layers.

    Raises:
        ImagicError: the denoiser has no such layers.
    """
    levels = len(base.architecture.denoiser["block_out_channels"]) - 1
    layers = []
    for name, block in base.denoiser.named_modules():
        match = _BLOCK.match(f"{name}.")
        if not match or not isinstance(block, BasicTransformerBlock):
            continue
        half, index, _ = match.groups()
        place: Any = half or "mid"
        level = int(index) if place == "down" else levels - int(index or 0)
        for attribute in ("attn1", "attn2"):
            module = getattr(block, attribute)
            if module is not None:
                layers.append((Layer(f"{name}.{attribute}", module.is_cross_attention, place, level), module))
    if not layers:
        got = f"base {base.name}, whose denoiser has no attention layers as those of Stable Diffusion's U-Nets"
        raise ImagicError(got, "a base with a U-Net that attends to the prompt", "choose another base or another method")
    return layers


@contextmanager
def tapped(base: Base, edit: AttentionEdit) -> Iterator[None]:
    """A context in which an edit sees, and may change, the attention probabilities of every pass through the denoiser.

    Afterwards, also after an exception, each layer has the same processor object as before. Should Ctrl-C interrupt even that, the
    remaining processors act as the original ones, and the next tap removes them.

    Args:
        base: a base with a U-Net, with or without LoRA layers.
        edit: the edit.

    Raises:
        ImagicError: as :func:`attention_layers`.
    """
    layers = attention_layers(base)
    originals = [_original(module.processor) for _, module in layers]
    tap = _Open(edit)
    try:
        for (layer, module), original in zip(layers, originals, strict=True):
            module.set_processor(_TapProcessor(layer, ref(tap), original))  # pyright: ignore[reportArgumentType]
        yield
    finally:
        del tap
        for (_, module), original in zip(layers, originals, strict=True):
            module.set_processor(original)


def _original(processor: Any) -> Any:
    """Returns the processor that a closed tap has left its own in place of; any other processor is returned as it is."""
    while isinstance(processor, _TapProcessor) and processor.tap() is None:
        processor = processor.original
    return processor


def map_size(latents: Tensor, level: int) -> tuple[int, int]:
    """Returns height and width of the positions of a layer: those of the latents, halved and rounded up once for each level.

    Args:
        latents: ``[B, C, h, w]``.
        level: as in :class:`Layer`.
    """
    height, width = latents.shape[2:]
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def map_bytes(base: Base, samples: int, self_queries: int) -> int:
    """Returns the bytes of attention probabilities that a tapped layer holds at a time, at the resolution of the base.

    A layer holds three copies in fp32: the scores, the probabilities, and those that an edit returns. Added to the peak of a pass without
    a tap they are an upper bound, since both peaks need not be at the same layer.

    Args:
        base: a base with a U-Net.
        samples: number of samples in a call of the denoiser.
        self_queries: largest number of queries of the self-attention that is tapped. Cross-attention is tapped in all layers.
    """
    side, tokens = base.resolution // base.architecture.vae_scale_factor, base.architecture.conditioning["tokens"][1]
    largest = 0
    for layer, module in attention_layers(base):
        queries = (side >> layer.level) ** 2
        keys = tokens if layer.cross else queries if queries <= self_queries else 0
        largest = max(largest, module.heads * queries * keys)
    return _COPIES * 4 * samples * largest


def coarsest_cross_layers(base: Base) -> list[Layer]:
    """Returns the cross-attention layers of the down and up blocks at the smallest size of their maps.

    They are the layers that Prompt-to-Prompt and LEDITS++ localise words with: at a quarter of the size of the latents in Stable Diffusion
    1.x, 2.x and XL. The middle block, at an eighth, is not used.

    Args:
        base: a base with a U-Net.

    Raises:
        ImagicError: the down and up blocks have no cross-attention.
    """
    layers = [layer for layer, _ in attention_layers(base) if layer.cross and layer.place != "mid"]
    if not layers:
        got = f"base {base.name}, whose down and up blocks have no cross-attention"
        raise ImagicError(got, "a base whose maps of cross-attention can localise words", "choose another base or another method")
    deepest = max(layer.level for layer in layers)
    return [layer for layer in layers if layer.level == deepest]


def word_maps(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Returns how much each position attends to the words of each sample: summed over their tokens, averaged over the heads.

    Args:
        probabilities: of one cross-attention layer, ``[B, heads, queries, T]``.
        tokens: 1 for the tokens of the words and 0 elsewhere, ``[B, T]``.

    Returns:
        Maps ``[B, queries]``.
    """
    return torch.einsum("bhqt,bt->bq", probabilities, tokens.to(probabilities)) / probabilities.shape[1]
