"""Bytes of what the last training stage trains, by mode. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from ..bases.architecture import Architecture
from ..core.config import Mode
from .optimizer_states import state_bytes

_FP32 = 4  # bytes an element of LoRA weights and embeddings
_HALF = 2  # bytes an element of full weights in an adapter
_OPTIMISED = ("tokens", "pooled")  # the tensors of a conditioning that stage embed trains


@dataclass(frozen=True)
class Trained:
    """Bytes of what the last training stage trains.

    Args:
        weights: of the trained tensors.
        added: of those among them that are added to the denoiser: LoRA layers.
        states: of the optimizer.
        stored: of the denoiser's weights in the adapter.
    """

    weights: int
    added: int
    states: int
    stored: int


class Counts(Protocol):
    """The counted weights of a denoiser: :class:`~imagic_lora.memory.symbolic.layers.Layers`, or those of a rehearsal.

    ``parameters`` and ``bytes`` of its weights, and bytes of the optimizer's ``states`` for them; ``lora``: parameters of the LoRA layers
    of the run, ``lora_states``: bytes of their states.
    """

    parameters: int
    bytes: int
    states: int
    lora: int
    lora_states: int


@dataclass
class CountedWeights:
    """The counted weights of a denoiser, see :class:`Counts`."""

    parameters: int
    bytes: int
    states: int
    lora: int
    lora_states: int


def word_trained(architecture: Architecture, vectors: int, optimizer: str) -> Trained:
    """The bytes of what textual inversion trains: the vectors of a new word for every text encoder.

    Args:
        architecture: configs of the base's components.
        vectors: number of vectors of the word.
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``, for which stage 1 takes ``adam``.
    """
    sizes = [vectors * shape[-1] for shape in architecture.vectors.values()]
    return Trained(_FP32 * sum(sizes), 0, sum(state_bytes(optimizer, size) for size in sizes), _FP32 * sum(sizes))


def trained(architecture: Architecture, mode: Mode, unet: Counts, optimizer: str) -> Trained:
    """The bytes of what a mode trains last: LoRA layers, the denoiser, or the embedding.

    Args:
        architecture: configs of the base's components.
        mode: the mode of the run.
        unet: the counted layers of the denoiser, with the LoRA layers of the run.
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``; stage 1 takes ``adam`` for the latter.
    """
    match mode:
        case "lora":
            size = _FP32 * unet.lora
            return Trained(size, size, unet.lora_states, size)
        case "full":
            return Trained(unet.bytes, 0, unet.states, _HALF * unet.parameters)
        case "embedding":
            sizes = [prod(shape) for name, shape in architecture.conditioning.items() if name in _OPTIMISED]
            return Trained(_FP32 * sum(sizes), 0, sum(state_bytes(optimizer, size) for size in sizes), 0)
