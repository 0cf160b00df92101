"""Names and sizes of layers that need no torch: LoRA targets, 4-bit blocks, parameter counts."""

from __future__ import annotations

from typing import Any

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

_CONV = ("conv1", "conv2")

_REST = (
    "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "time_embedding.cond_proj", "add_embedding.linear_1",
    "add_embedding.linear_2",
)  # fmt: skip

LORA_TARGETS = {"attention": ATTENTION, "attention+conv": (*ATTENTION, *_CONV), "all": (*ATTENTION, *_CONV, *_REST)}
"""Layers by the ends of their names; ``all`` is every linear and convolutional one."""

BLOCK_4BIT = 64  # weights that share a scale in 4 bits


def text_parameters(config: dict[str, Any], projects: bool = False) -> int:
    """Parameters of a ``CLIPTextModel``: token and position embeddings, blocks of attention and MLP with two norms each, a last norm.

    Args:
        projects: it is one ``WithProjection``, of the pooled embedding.
    """
    d, inner = config["hidden_size"], config["intermediate_size"]
    block = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    ends = (config["vocab_size"] + config["max_position_embeddings"]) * d + 2 * d
    return ends + config["num_hidden_layers"] * block + (d * config["projection_dim"] if projects else 0)
