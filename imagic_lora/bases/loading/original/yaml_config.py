"""The YAML config of the original code, which lies beside a checkpoint under the same name. This module does not import torch."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....core.errors import ImagicError
from ....core.yaml_files import read_yaml
from ..keys import Keys, check_keys, names
from ..vetting import read_text

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
_INPUTS = {"crossattn": "text", "hybrid": "inpainting"}  # what conditions the U-Net; the channels of its first layer tell the rest
_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # diffusers' names for those of the original code
_NUMBERS = {"timesteps": "num_train_timesteps", "linear_start": "beta_start", "linear_end": "beta_end", "scale_factor": "scaling_factor"}

_PARAMS = Keys(  # the arguments of LatentDiffusion, DDPM, and DiffusionEngine
    honoured=names(
        "parameterization conditioning_key beta_schedule denoiser_config cond_stage_config unet_config network_config", " ".join(_NUMBERS)
    ),
    harmless=names(
        # training
        "base_learning_rate monitor use_ema reset_ema reset_num_ema_updates ema_decay_rate loss_type loss_fn_config log_every_t",
        "original_elbo_weight v_posterior l_simple_weight learn_logvar logvar_init make_it_fit ucg_training scheduler_config",
        "optimizer_config cond_stage_trainable num_timesteps_cond ckpt_path ignore_keys load_only_unet personalization_config",
        "sampler_config log_keys no_cond_log compile_model use_checkpoint",
        # names of inputs, sizes of samples, and what the tensors show
        "first_stage_key cond_stage_key input_key image_size channels clip_denoised first_stage_config conditioner_config network_wrapper",
        "concat_mode cond_stage_forward cosine_s disable_first_stage_autocast en_and_decode_n_samples_a_time embedding_reg_weight",
        "unfreeze_model model_lr",
        "finetune_keys keep_finetune_dims masked_image_key",  # of inpainting models
    ),
    refused={
        "concat_keys": ["mask", "masked_image"], "scale_by_std": False, "given_betas": None, "use_positional_encodings": False,
        "force_null_conditioning": False,
    },
)  # fmt: skip
_UNET = Keys(
    honoured=names("num_heads num_head_channels"),
    harmless=names(
        # what the tensors show
        "in_channels out_channels model_channels num_res_blocks channel_mult attention_resolutions context_dim transformer_depth",
        "num_classes adm_in_channels use_linear_in_transformer use_spatial_transformer transformer_depth_middle",
        "image_size use_checkpoint use_fp16 use_bf16 legacy dropout spatial_transformer_attn_type offload_to_cpu",
    ),
    refused={
        "use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": False, "conv_resample": True, "dims": 2,
        "num_heads_upsample": -1, "n_embed": None, "disable_middle_self_attn": False, "disable_self_attentions": None,
        "num_attention_blocks": None, "use_temporal_attention": False,
    },
)  # fmt: skip
_TEXT = Keys(
    honoured=frozenset(),
    harmless=names("version arch device max_length freeze layer layer_idx use_checkpoint always_return_pooled legacy"),
)


def yaml_settings(path: Path) -> dict[str, Any]:
    """What the YAML config of a checkpoint states, by setting: see :class:`.statements.Statement`.

    Keys are honoured, harmless or refused as those of diffusers' configs. What the tensors show is not read. A file that describes no
    model, such as the settings of a training, states nothing.

    Raises:
        ImagicError: the file cannot be read, or describes a model that is not supported.
    """
    read_text(path)  # refuses what is no file of a reasonable size
    params = _mapping(_mapping(read_yaml(path).get("model")).get("params"))
    check_keys(path, _PARAMS, params)
    check_keys(path, _UNET, _inside(params, "unet_config") | _inside(params, "network_config"))
    text = _inside(params, "cond_stage_config")
    check_keys(path, _TEXT, text)
    settings = {name: params[key] for key, name in _NUMBERS.items() if key in params}
    if bad := [key for key, name in _NUMBERS.items() if type(settings.get(name, 1.0)) not in (int, float)]:
        raise _unsupported(path, bad[0], params[bad[0]], "a number")
    if "parameterization" in params:
        settings["prediction_type"] = _known(path, "parameterization", params["parameterization"], _PREDICTIONS)
    if _known(path, "conditioning_key", params.get("conditioning_key", "crossattn"), _INPUTS) == "inpainting":
        settings["inpaints"] = True
    if "beta_schedule" in params:
        settings["beta_schedule"] = _known(path, "beta_schedule", params["beta_schedule"], _SCHEDULES)
    _check_layer(path, params, text)
    return settings | _denoiser(path, _inside(params, "denoiser_config")) | _heads(_inside(params, "unet_config"))


def _denoiser(path: Path, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """What the denoiser of Stability's later code states: the prediction type, and that the noise process is that of DDPM."""
    spacing = _class(denoiser, "discretization_config")
    if spacing not in (None, "LegacyDDPMDiscretization"):
        raise _unsupported(path, "discretization_config", spacing, "LegacyDDPMDiscretization")
    scaling = _class(denoiser, "scaling_config")
    return {} if scaling is None else {"prediction_type": _known(path, "scaling_config", scaling, _SCALINGS)}


def _check_layer(path: Path, params: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises ImagicError if the text encoder ends at another layer than the one that its family uses."""
    target, layer = str(_mapping(params.get("cond_stage_config")).get("target", "")), text.get("layer", "last")
    expected = "penultimate" if "OpenCLIP" in target else "last"
    if target and layer != expected:
        raise _unsupported(path, "layer of cond_stage_config", layer, expected)


def _heads(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Number of attention heads of every level, which the tensors do not show."""
    heads, per_head, width, levels = (unet.get(key) for key in ("num_heads", "num_head_channels", "model_channels", "channel_mult"))
    if not isinstance(levels, list) or not all(type(level) is int for level in levels):
        return {}
    if type(heads) is int and heads > 0:
        return {"attention_head_dim": [heads] * len(levels)}
    if type(per_head) is int and per_head > 0 and type(width) is int:
        return {"attention_head_dim": [width * level // per_head for level in levels]}
    return {}


def _known(path: Path, key: str, value: object, values: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in values:
        raise _unsupported(path, key, value, f"one of {', '.join(values)}")
    return values[value]


def _unsupported(path: Path, key: str, value: object, expected: str) -> ImagicError:
    remedy = "choose another base, or correct or remove the file if it does not belong to the checkpoint"
    return ImagicError(f"{path} has {key} = {reprlib.repr(value)}, which is not supported", expected, remedy)


def _class(config: Mapping[str, Any], key: str) -> str | None:
    """Name of the class that a part of a config names, without its module."""
    target = _mapping(config.get(key)).get("target")
    return None if target is None else str(target).rpartition(".")[2]


def _inside(params: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The ``params`` of a part of a config."""
    return _mapping(_mapping(params.get(key)).get("params"))


def _mapping(value: object) -> dict[str, Any]:
    return {str(name): inner for name, inner in value.items()} if isinstance(value, dict) else {}
