"""Checks that the sizes in a base's configs are plausible and match each other. This module does not import torch."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from ..architecture import KLEIN_LAYERS
from .vetting import TIME_IDS, inpainting_channels, unusable_base

_REQUIRED = {
    "unet": ("sample_size", "in_channels", "out_channels", "cross_attention_dim", "layers_per_block", "block_out_channels"),
    "vae": ("sample_size", "latent_channels", "layers_per_block", "block_out_channels"),
    "text_encoder": (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    ),
}  # fmt: skip
_REQUIRED["text_encoder_2"] = (*_REQUIRED["text_encoder"], "projection_dim")
_REQUIRED_SD3 = {
    "transformer": (
        "sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
    ),
    "vae": _REQUIRED["vae"],
    "text_encoder": _REQUIRED["text_encoder_2"],
    "text_encoder_2": _REQUIRED["text_encoder_2"],
    "text_encoder_3": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    "scheduler": ("shift",),
}  # fmt: skip
_REQUIRED_KLEIN = {
    "transformer": (
        "patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
        "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta",
    ),
    "vae": (*_REQUIRED["vae"], "patch_size"),
    "text_encoder": (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    ),
    "scheduler": ("shift",),
}  # fmt: skip
_FLOATS = ("shift", "mlp_ratio", "rope_theta")
_LISTS = (
    "block_out_channels", "decoder_block_out_channels", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
    "axes_dims_rope", "patch_size",
)  # fmt: skip
_ALL_REQUIRED = (*_REQUIRED.values(), *_REQUIRED_SD3.values(), *_REQUIRED_KLEIN.values())
_SIZES = {name for names in _ALL_REQUIRED for name in names} - set(_FLOATS) | {
    *_LISTS,
    "norm_num_groups",
    "num_train_timesteps",
}
_SIZES |= {"relative_attention_num_buckets", "relative_attention_max_distance"}
_SIZES |= {"addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"}
_NUMBERS = (
    *_FLOATS,
    "scaling_factor",
    "batch_norm_eps",
    "rms_norm_eps",
    "eps",
    "layer_norm_epsilon",
    "norm_eps",
    "layer_norm_eps",
    "mid_block_scale_factor",
    "resnet_out_scale_factor",
)
_INTEGERS = ("freq_shift", "downsample_padding", "bos_token_id", "eos_token_id", "pad_token_id")
_MAX_VALUES = {
    "layers_per_block": 4,
    "transformer_layers_per_block": 10,
    "reverse_transformer_layers_per_block": 10,
    "num_hidden_layers": 64,
    "num_layers": 64,
    "num_single_layers": 128,
    "pos_embed_max_size": 1024,
}
_MAX_VALUE = 2**20  # of every other setting
_MAX_BLOCKS = 6


def check_sizes(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Checks that the sizes of the components are plausible and match each other.

    The limits ensure that building the components on the meta device takes seconds at most.

    Args:
        folder: folder of the base, for messages.
        parts: configs of ``unet``, ``vae``, ``text_encoder``, ``scheduler``, and ``text_encoder_2`` if there is one.

    Raises:
        ImagicError: a required setting is missing; a setting is implausible; the U-Net has unsupported inputs; sizes do not match.
    """
    unet, vae = parts["unet"], parts["vae"]
    _check_plausible(folder, parts, _REQUIRED)
    _check_inputs(folder, unet, has_second=parts.get("text_encoder_2") is not None)
    block_lists = (
        (unet["block_out_channels"], int), (unet.get("down_block_types", ()), str),
        (unet.get("up_block_types", ()), str), (vae["block_out_channels"], int),
    )  # fmt: skip
    for blocks, item_type in block_lists:
        if not isinstance(blocks, list) or not all(isinstance(block, item_type) for block in blocks):
            raise unusable_base(f"{folder} has the blocks {reprlib.repr(blocks)}", "a list of channel counts or of block types")
    _check_matching(folder, unet, vae, parts["text_encoder"], parts.get("text_encoder_2"))


def check_sd3_sizes(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """As :func:`check_sizes`, of Stable Diffusion 3, and of its transformer with one CLIP text encoder alone.

    Args:
        folder: folder of the base, for messages.
        parts: configs of ``transformer``, ``vae``, ``scheduler``, ``text_encoder``; ``text_encoder_2`` and ``text_encoder_3``
            if the base has them.
    """
    alone = "text_encoder_2" not in parts
    _check_plausible(folder, parts, _REQUIRED_SD3 | ({"text_encoder": _REQUIRED["text_encoder"]} if alone else {}))
    transformer, vae = parts["transformer"], parts["vae"]
    texts = [parts["text_encoder"]] if alone else [parts["text_encoder"], parts["text_encoder_2"]]
    t5 = parts.get("text_encoder_3", {"d_model": transformer["joint_attention_dim"]})
    if not isinstance(blocks := vae["block_out_channels"], list):
        raise unusable_base(f"{folder} has the blocks {reprlib.repr(blocks)}", "a list of channel counts")
    dual = transformer.get("dual_attention_layers") or []
    if not isinstance(dual, list) or not all(type(layer) is int and 0 <= layer < transformer["num_layers"] for layer in dual):
        raise unusable_base(f"{folder} has the dual_attention_layers {reprlib.repr(dual)}", "numbers of layers of the transformer")
    if any(isinstance(transformer[name], list) for name in _REQUIRED_SD3["transformer"]):
        raise unusable_base(f"{folder} has a transformer with lists of sizes", "one number for every size")
    if transformer["sample_size"] > transformer["patch_size"] * transformer["pos_embed_max_size"]:
        got = f"{folder} has the sample_size {transformer['sample_size']}"
        raise unusable_base(got, "at most patch_size * pos_embed_max_size, the positions of the transformer")
    inner = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    _check_equal(
        folder,
        {
            "out_channels and in_channels of the transformer": (transformer["out_channels"], transformer["in_channels"]),
            "latent_channels of the VAE and in_channels of the transformer": (vae["latent_channels"], transformer["in_channels"]),
            "in_channels of the VAE and channels of an RGB image": (vae.get("in_channels", 3), 3),
            "out_channels of the VAE and channels of an RGB image": (vae.get("out_channels", 3), 3),
            "caption_projection_dim and width of the transformer": (transformer["caption_projection_dim"], inner),
            "d_model of T5 and joint_attention_dim": (t5["d_model"], transformer["joint_attention_dim"]),
            "width of the pooled embedding and pooled_projection_dim": (
                sum(text["hidden_size" if alone else "projection_dim"] for text in texts), transformer["pooled_projection_dim"],
            ),
            "max_position_embeddings of the CLIP text encoders": (
                texts[0]["max_position_embeddings"], texts[-1]["max_position_embeddings"],
            ),
        },
    )  # fmt: skip
    if (width := sum(text["hidden_size"] for text in texts)) > transformer["joint_attention_dim"]:
        got = f"{folder} has CLIP text encoders of {width} channels together"
        raise unusable_base(got, f"at most {transformer['joint_attention_dim']}, the joint_attention_dim of the transformer")
    if alone and width != transformer["joint_attention_dim"]:
        raise unusable_base(f"{folder} has a text encoder of {width} channels", "the joint_attention_dim of the transformer")


def check_klein_sizes(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """As :func:`check_sizes`, of FLUX.2 klein.

    Args:
        folder: folder of the base, for messages.
        parts: configs of ``transformer``, ``vae``, ``text_encoder`` and ``scheduler``.
    """
    _check_plausible(folder, parts, _REQUIRED_KLEIN)
    transformer, vae, text = parts["transformer"], parts["vae"], parts["text_encoder"]
    lists = [vae["block_out_channels"], vae.get("decoder_block_out_channels") or vae["block_out_channels"], transformer["axes_dims_rope"]]
    if not all(isinstance(sizes, list) for sizes in lists):
        raise unusable_base(f"{folder} has the sizes {reprlib.repr(lists)}", "lists of channel counts and of the sizes of positions")
    if any(isinstance(transformer[name], list) for name in ("attention_head_dim", "num_attention_heads")):
        raise unusable_base(f"{folder} has a transformer with lists of sizes", "one number for every size")
    if text["num_hidden_layers"] < KLEIN_LAYERS[-1]:
        got = f"{folder} has a text encoder of {text['num_hidden_layers']} layers"
        raise unusable_base(got, f"at least {KLEIN_LAYERS[-1]}, the last that is read")
    if set(text.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise unusable_base(f"{folder} has a text encoder with the layers {reprlib.repr(text['layer_types'])}", "full_attention alone")
    _check_equal(
        folder,
        {
            "patch_size of the transformer and that of packed latents": (transformer["patch_size"], 1),
            "patch_size of the VAE and that of latents": (vae["patch_size"], [2, 2]),
            "out_channels and in_channels of the transformer": (
                transformer.get("out_channels") or transformer["in_channels"], transformer["in_channels"],
            ),
            "latent_channels of the VAE in patches and in_channels of the transformer": (
                4 * vae["latent_channels"], transformer["in_channels"],
            ),
            "in_channels of the VAE and channels of an RGB image": (vae.get("in_channels", 3), 3),
            "out_channels of the VAE and channels of an RGB image": (vae.get("out_channels", 3), 3),
            "number of axes_dims_rope and of the coordinates of a position": (len(transformer["axes_dims_rope"]), 4),
            "axes_dims_rope and attention_head_dim": (sum(transformer["axes_dims_rope"]), transformer["attention_head_dim"]),
            "hidden_size of the text encoder in three layers and joint_attention_dim": (
                len(KLEIN_LAYERS) * text["hidden_size"], transformer["joint_attention_dim"],
            ),
        },
    )  # fmt: skip


def rope_theta(folder: Path, text: dict[str, Any]) -> float:
    """The base of the rotary positions of a text encoder, which older configs state by itself.

    Raises:
        ImagicError: it has other positions than the default ones, or none.
    """
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta")}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    kinds = {name: value for name, value in rope.items() if name != "rope_theta"} if isinstance(rope, dict) else {}
    if kinds not in ({}, {"rope_type": "default"}) or not isinstance(theta, (int, float)) or not 0 < theta <= 2**30:
        got = f"{folder} has a text encoder with the positions {reprlib.repr(rope)}"
        raise unusable_base(got, "a rope_theta, and the rope_type default")
    return float(theta)


def _check_plausible(folder: Path, parts: dict[str, dict[str, Any]], required: dict[str, tuple[str, ...]]) -> None:
    """Raises ImagicError for a setting that is missing or implausible."""
    if missing := [f"{part}/config.json: {name}" for part in parts for name in required.get(part, ()) if parts[part].get(name) is None]:
        got = f"{folder} does not state sizes of the model ({', '.join(missing)})"
        remedy = "add them to these files, with the sizes of the weights, or download the base again"
        raise ImagicError(got, "configs with all sizes: defaults of diffusers may not be those of these weights", remedy)
    if problems := [f"{part}.{name}" for part, config in parts.items() for name, value in config.items() if not _is_plausible(name, value)]:
        names = ", ".join(repr(name[:60]) for name in problems[:5])
        raise unusable_base(f"{folder} has implausible settings: {names}", "the configs of a base of this family")


def _check_equal(folder: Path, pairs: dict[str, tuple[Any, ...]]) -> None:
    """Raises ImagicError for a pair of sizes that differ, with its name."""
    for names, (first_size, second_size) in pairs.items():
        if first_size != second_size:
            raise unusable_base(f"{folder} has configs that do not match: {names}, {first_size} and {second_size}", "equal sizes")


def _check_inputs(folder: Path, unet: dict[str, Any], has_second: bool) -> None:
    """Raises ImagicError if the U-Net has added conditions that its family does not have, or lacks those that it has."""
    added = unet.get("addition_embed_type")
    if added != ("text_time" if has_second else None):
        expected = "text_time, for pooled embedding and size ids" if has_second else "none: the U-Net is conditioned on text only"
        raise unusable_base(f"{folder} has a U-Net with the addition_embed_type {reprlib.repr(added)}", expected)


def _check_matching(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], second: dict[str, Any] | None) -> None:
    """Raises ImagicError if two sizes differ that must be equal."""
    inpaints = unet["in_channels"] == inpainting_channels(vae["latent_channels"])
    latents = vae["latent_channels"] if inpaints else unet["in_channels"]
    channels, text_width = len(unet["block_out_channels"]), text["hidden_size"] + (second["hidden_size"] if second else 0)
    pairs = {
        "numbers of down_block_types and block_out_channels": (len(unet["down_block_types"]), channels),
        "numbers of up_block_types and block_out_channels": (len(unet["up_block_types"]), channels),
        "out_channels and in_channels of the U-Net": (unet["out_channels"], latents),
        "latent_channels of the VAE and in_channels of the U-Net": (vae["latent_channels"], latents),
        "in_channels of the VAE and channels of an RGB image": (vae.get("in_channels", 3), 3),
        "out_channels of the VAE and channels of an RGB image": (vae.get("out_channels", 3), 3),
        "hidden_size of the text encoders and cross_attention_dim": (text_width, unet["cross_attention_dim"]),
        "size of the added conditions and projection_class_embeddings_input_dim": _added_condition_sizes(unet, second),
    }
    _check_equal(folder, pairs)


def _added_condition_sizes(unet: dict[str, Any], second: dict[str, Any] | None) -> tuple[int, int]:
    """Size of pooled embedding plus embedded size ids, and the size that the U-Net's config expects for them; zeros without them."""
    if second is None:
        return 0, 0
    actual = second["projection_dim"] + TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
    return actual, unet.get("projection_class_embeddings_input_dim") or 0


def _is_plausible(name: str, value: object) -> bool:
    """Whether a setting has a plausible type and value.

    None stands for the default of diffusers. Settings that affect no tensor size are only checked for huge numbers and nested lists:
    diffusers checks the rest.
    """
    limit = _MAX_VALUES.get(name, _MAX_VALUE)
    if name in _NUMBERS:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= limit
    if name in _INTEGERS:
        return type(value) is int and 0 <= value <= limit
    if value is None:
        return True
    items = value if isinstance(value, list) and (name in _LISTS or name not in _SIZES) else [value]
    if name in _SIZES:
        return 0 < len(items) <= _MAX_BLOCKS and all(type(item) is int and 0 < item <= limit for item in items)
    return all(abs(item) <= limit if isinstance(item, (int, float)) else not isinstance(item, list) for item in items)
