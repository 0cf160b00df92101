"""Layer names and sizes: LoRA targets, block size of 4-bit weights, parameter counts. This module does not import torch."""

from __future__ import annotations

from typing import Any

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

_CONV = ("conv1", "conv2")

_OTHERS = (
    "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "time_embedding.cond_proj", "add_embedding.linear_1",
    "add_embedding.linear_2",
)  # fmt: skip

LORA_TARGETS = {"attention": ATTENTION, "attention+conv": (*ATTENTION, *_CONV), "all": (*ATTENTION, *_CONV, *_OTHERS)}
"""Suffixes of layer names by LoRA preset. ``all`` covers every linear and convolutional layer of the U-Net."""

BLOCK_4BIT = 64
"""Number of consecutive 4-bit weights that share one scale."""


def text_parameters(config: dict[str, Any], projects: bool = False) -> int:
    """Number of parameters of a ``CLIPTextModel``.

    Counts token and position embeddings, the blocks (attention, MLP and two layer norms each), and the final layer norm.

    Args:
        config: config of the text encoder.
        projects: True for a ``CLIPTextModelWithProjection``, which adds the projection of the pooled embedding.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * inner + inner + hidden
    block = attention + mlp + 4 * hidden
    embeddings_and_norm = (config["vocab_size"] + config["max_position_embeddings"]) * hidden + 2 * hidden
    return embeddings_and_norm + config["num_hidden_layers"] * block + (hidden * config["projection_dim"] if projects else 0)
