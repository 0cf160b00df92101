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

_JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of image and text

_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

_OTHERS_OF_TRANSFORMER = (
    "pos_embed.proj", "timestep_embedder.linear_1", "timestep_embedder.linear_2", "text_embedder.linear_1", "text_embedder.linear_2",
    "context_embedder", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out",
)  # fmt: skip

TRANSFORMER_TARGETS = {
    "attention": _JOINT_ATTENTION,
    "attention+mlp": (*_JOINT_ATTENTION, *_MLP),
    "all": (*_JOINT_ATTENTION, *_MLP, *_OTHERS_OF_TRANSFORMER),
}
"""As :data:`LORA_TARGETS`, of the transformer of Stable Diffusion 3."""

_KLEIN_MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

_KLEIN_OTHERS = (
    "x_embedder", "context_embedder", "timestep_embedder.linear_1", "timestep_embedder.linear_2", "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear", "single_stream_modulation.linear", "norm_out.linear", "proj_out",
)  # fmt: skip


def klein_targets(single_layers: int) -> dict[str, tuple[str, ...]]:
    """As :data:`LORA_TARGETS`, of the transformer of FLUX.2 klein.

    A block of the single stream has queries, keys, values and the first layer of its MLP in one linear layer, and the output of both in
    another: ``attention`` adapts these too. The second is named in full: in blocks of two streams ``to_out`` is a list of layers.

    Args:
        single_layers: number of blocks of the single stream.
    """
    outputs = tuple(f"single_transformer_blocks.{index}.attn.to_out" for index in range(single_layers))
    attention = (*_JOINT_ATTENTION, "to_qkv_mlp_proj", *outputs)
    return {"attention": attention, "attention+mlp": (*attention, *_KLEIN_MLP), "all": (*attention, *_KLEIN_MLP, *_KLEIN_OTHERS)}


BLOCK_4BIT = 64
"""Number of consecutive 4-bit weights that share one scale."""


def text_parameters(config: dict[str, Any], kind: str = "CLIPTextModel") -> int:
    """Number of parameters of a text encoder.

    Counts token and position embeddings, the blocks (attention, MLP and two layer norms each), and the final layer norm.

    Args:
        config: config of the text encoder.
        kind: its class: ``CLIPTextModel``; ``CLIPTextModelWithProjection``, which adds the projection of the pooled embedding;
            ``T5EncoderModel``; or ``Qwen3ForCausalLM``, without the final norm and the head, which are not loaded.
    """
    if kind == "T5EncoderModel":
        return _t5_parameters(config)
    if kind == "Qwen3ForCausalLM":
        return _qwen3_parameters(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * inner + inner + hidden
    block = attention + mlp + 4 * hidden
    embeddings_and_norm = (config["vocab_size"] + config["max_position_embeddings"]) * hidden + 2 * hidden
    return embeddings_and_norm + config["num_hidden_layers"] * block + (hidden * config["projection_dim"] if kind != "CLIPTextModel" else 0)


def _t5_parameters(config: dict[str, Any]) -> int:
    """Token embeddings, the blocks (attention, MLP and two norms without bias each), the relative positions, and the final norm."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    attention = 4 * width * heads * config["d_kv"]
    mlp = (3 if config.get("feed_forward_proj", "relu").startswith("gated") else 2) * width * inner
    positions = config.get("relative_attention_num_buckets", 32) * heads
    return config["vocab_size"] * width + config["num_layers"] * (attention + mlp + 2 * width) + positions + width


def _qwen3_parameters(config: dict[str, Any]) -> int:
    """Token embeddings, and the blocks: attention with norms of queries and keys, a gated MLP, and two norms, without bias."""
    width, head = config["hidden_size"], config["head_dim"]
    attention = 2 * width * head * (config["num_attention_heads"] + config["num_key_value_heads"]) + 2 * head
    block = attention + 3 * width * config["intermediate_size"] + 2 * width
    return config["vocab_size"] * width + config["num_hidden_layers"] * block
