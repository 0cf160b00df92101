"""The published component configs of the built-in bases. This module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import KLEIN_LAYERS, Architecture, KleinArchitecture, SD3Architecture, UNetArchitecture
from .known import SHIPPED

_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
_SD3: dict[str, Any] = {  # the defaults of diffusers
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64, "num_attention_heads": 18,
    "joint_attention_dim": 4096, "caption_projection_dim": 1152, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 96,
}  # fmt: skip
_T5: dict[str, Any] = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}  # of transformers
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_SCHEDULER = {"clip_sample": False, "steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_CLIP_L = _TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}

# sample_size of a U-Net is the side of its latents, sample_size of a VAE is the side of its images in pixels
PUBLISHED: dict[str, Architecture] = {
    # Stable Diffusion 1.5: U-Net of 860M parameters, 64x64 latents, text encoder of CLIP ViT-L/14 (arXiv 2112.10752 and the model card)
    "sd15": UNetArchitecture(
        _UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        {"text_encoder": _CLIP_L},
        _SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"},
    ),
    # Stable Diffusion 2.1: attention heads of 64 channels, linear projections, 23 layers of OpenCLIP ViT-H, 768x768 pixels, v-prediction
    "sd21": UNetArchitecture(
        _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        _VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        {
            "text_encoder": _TEXT
            | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
            | {"projection_dim": 512, "pad_token_id": 1}
        },
        _SCHEDULER | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    # Stable Diffusion XL 1.0: U-Net of 2.6B parameters, 128x128 latents, CLIP ViT-L and OpenCLIP ViT-bigG, size ids (arXiv 2307.01952)
    "sdxl": UNetArchitecture(
        _UNET
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _TEXT
            | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"}
            | {"projection_dim": 1280, "pad_token_id": 1},
        },
        _SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"},
        empty_is_zeros=True,
    ),
}

_BIG_G = PUBLISHED["sdxl"].text_encoders["text_encoder_2"]

for _name, _transformer in {  # 2.0 and 2.2 billion parameters, 1024x1024 pixels (arXiv 2403.03206 and the conversion of diffusers)
    "sd3-medium": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    },
    "sd35-medium": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    },
}.items():  # fmt: skip
    PUBLISHED[_name] = SD3Architecture(
        _SD3 | _transformer,
        _VAE
        | {"sample_size": 1024, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
        | {"use_quant_conv": False, "use_post_quant_conv": False},
        {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _BIG_G,
            "text_encoder_3": _T5 | {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
        },
        _FLOW,
    )

_KLEIN: dict[str, Any] = {
    "patch_size": 1, "in_channels": 128, "attention_head_dim": 128, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "guidance_embeds": False,
}  # fmt: skip
_KLEIN_VAE: dict[str, Any] = _VAE | {"latent_channels": 32, "sample_size": 1024, "batch_norm_eps": 1e-4, "patch_size": [2, 2]}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "num_hidden_layers": KLEIN_LAYERS[-1], "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
_KLEIN_FLOW = _FLOW | {"use_dynamic_shifting": True}

for _size, _transformer, _text in (  # 3.9 and 9.1 billion parameters, with Qwen3-4B and Qwen3-8B (the conversion of diffusers)
    (
        "4b",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        {"hidden_size": 2560, "intermediate_size": 9728},
    ),
    (
        "9b",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        {"hidden_size": 4096, "intermediate_size": 12288},
    ),
):
    PUBLISHED[f"klein-base-{_size}"] = KleinArchitecture(_KLEIN | _transformer, _KLEIN_VAE, {"text_encoder": _QWEN3 | _text}, _KLEIN_FLOW)
    PUBLISHED[f"klein-{_size}"] = replace(PUBLISHED[f"klein-base-{_size}"], few_steps=SHIPPED[f"klein-{_size}"].few_steps)

PUBLISHED["sdxl-turbo"] = replace(  # distilled from SDXL (arXiv 2311.17042)
    PUBLISHED["sdxl"],
    denoiser=PUBLISHED["sdxl"].denoiser | {"sample_size": 64},
    scheduler=_SCHEDULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"},
    few_steps=SHIPPED["sdxl-turbo"].few_steps,
)
