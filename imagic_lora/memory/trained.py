"""Bytes of what the last training stage trains, by mode. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from ..bases.architecture import Architecture
from ..core.config import Mode
from .optimizer_states import states_8bit

_ADAM_STATES = 8  # bytes an element: two fp32 moments
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

    ``parameters`` and ``bytes`` of its weights, ``states`` of Adam in 8 bits for them; ``lora``: parameters of the LoRA layers of the run,
    ``lora_states``: their states in 8 bits.
    """

    parameters: int
    bytes: int
    states: int
    lora: int
    lora_states: int


def trained(architecture: Architecture, mode: Mode, unet: Counts, optimizer: str) -> Trained:
    """The bytes of what a mode trains last: LoRA layers, the denoiser, or the embedding.

    Args:
        architecture: configs of the base's components.
        mode: the mode of the run.
        unet: the counted layers of the denoiser, with the LoRA layers of the run.
        optimizer: ``adam8bit`` or ``adam``.
    """
    in_8bit = optimizer == "adam8bit"
    match mode:
        case "lora":
            size = _FP32 * unet.lora
            return Trained(size, size, unet.lora_states if in_8bit else _ADAM_STATES * unet.lora, size)
        case "full":
            return Trained(unet.bytes, 0, unet.states if in_8bit else _ADAM_STATES * unet.parameters, _HALF * unet.parameters)
        case "embedding":
            sizes = [prod(shape) for name, shape in architecture.conditioning.items() if name in _OPTIMISED]
            return Trained(_FP32 * sum(sizes), 0, sum(states_8bit(size) if in_8bit else _ADAM_STATES * size for size in sizes), 0)
