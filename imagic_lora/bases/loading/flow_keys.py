"""Every key of the configs of Stable Diffusion 3: honoured, harmless, or refused, as in ``keys.py``. This module does not import torch."""

from __future__ import annotations

from dataclasses import replace

from .keys import CODE, KEYS, QUANTIZED, Keys, names

SD3_KEYS: dict[str, Keys] = {
    "transformer": Keys(
        names(
            "sample_size patch_size in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim",
            "caption_projection_dim pooled_projection_dim pos_embed_max_size dual_attention_layers qk_norm",
        ),
        names(CODE),
        QUANTIZED,
    ),
    # diffusers' pipeline of Stable Diffusion 3 decodes in the precision of the VAE, whatever force_upcast says
    "vae": Keys(
        (KEYS["vae"].honoured | {"shift_factor"}) - {"force_upcast"},
        KEYS["vae"].harmless | {"force_upcast"},
        {"latents_mean": None, "latents_std": None} | QUANTIZED,
    ),
    # the pipeline gives the text encoders no mask
    "text_encoder": replace(
        KEYS["text_encoder"],
        honoured=KEYS["text_encoder"].honoured - {"use_attention_mask"},
        refused={**KEYS["text_encoder"].refused, "use_attention_mask": False},
    ),
    "text_encoder_3": Keys(
        names(
            "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets relative_attention_max_distance",
            "layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act pad_token_id eos_token_id",
        ),
        # the decoder, which is not loaded; dropout; generation of texts
        KEYS["text_encoder"].harmless
        | names("num_decoder_layers dropout_rate classifier_dropout scale_decoder_outputs output_past n_positions bos_token_id"),
        KEYS["text_encoder"].refused,
    ),
    "tokenizer": KEYS["tokenizer"],
    "tokenizer_3": Keys(
        names(
            "eos_token unk_token pad_token additional_special_tokens extra_special_tokens added_tokens_decoder extra_ids",
            "model_max_length max_len",
        ),
        KEYS["tokenizer"].harmless | names("sp_model_kwargs bos_token"),
        {
            "padding_side": "right", "truncation_side": "right", "split_special_tokens": False, "sep_token": None, "cls_token": None,
            "mask_token": None, "init_inputs": [], "fast_tokenizer_files": ["tokenizer.json"], "model_specific_special_tokens": {},
            "vocab": None, "merges": None, "unk_id": None, "tokenizer": None, "tokenizer_object": None, "tokenizer_padding": None,
            "tokenizer_truncation": None, "post_processor": None, "gguf_file": None, "fix_mistral_regex": False,
        },
    ),
    "scheduler": Keys(
        names("num_train_timesteps shift"),
        # without dynamic shifting these do nothing
        names(CODE, "base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type"),
        {
            "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
        },
    ),
    "model_index": Keys(
        names("transformer vae text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3 scheduler"),
        names(CODE, "image_encoder feature_extractor"),
    ),
}  # fmt: skip
"""The keys by component. The second text encoder and tokenizer have those of the first."""
