"""Every key of the configs of Stable Diffusion 3 and FLUX.2 klein: honoured, harmless, or refused, as in ``keys.py``. No torch import."""

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

KLEIN_KEYS: dict[str, Keys] = {
    "transformer": Keys(
        names(
            "patch_size in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim",
            "timestep_guidance_channels mlp_ratio axes_dims_rope rope_theta eps",
        ),
        names(CODE),
        {"guidance_embeds": False} | QUANTIZED,  # klein has no such input, and its pipeline gives none
    ),
    "vae": Keys(
        (KEYS["vae"].honoured | names("decoder_block_out_channels batch_norm_eps patch_size")) - {"scaling_factor", "force_upcast"},
        KEYS["vae"].harmless | names("force_upcast batch_norm_momentum"),  # the momentum is of training
        # latents are normalised by the stored statistics of a batch norm, and by nothing else
        {"scaling_factor": None, "shift_factor": None, "latents_mean": None, "latents_std": None} | QUANTIZED,
    ),
    "text_encoder": Keys(
        names(
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act",
            "max_position_embeddings rms_norm_eps attention_bias rope_theta rope_parameters layer_types",
        ),
        # the tokenizer has the ids of its special tokens, and the mask that of padding
        (KEYS["text_encoder"].harmless | names("sliding_window max_window_layers bos_token_id eos_token_id pad_token_id"))
        - {"rope_theta", "rope_scaling"},
        {**KEYS["text_encoder"].refused, "use_sliding_window": False, "rope_scaling": None},
    ),
    # the chat template is compared with Qwen3's, and not run
    "tokenizer": Keys(
        KEYS["tokenizer"].honoured,
        KEYS["tokenizer"].harmless - names("add_prefix_space add_bos_token add_eos_token"),
        {**KEYS["tokenizer"].refused, "add_prefix_space": False, "add_bos_token": False, "add_eos_token": False},
    ),
    "scheduler": replace(
        SD3_KEYS["scheduler"],
        honoured=SD3_KEYS["scheduler"].honoured | {"use_dynamic_shifting"},
        # the pipeline has a formula of its own for the shift
        harmless=SD3_KEYS["scheduler"].harmless - {"time_shift_type"},
        refused={
            **{name: value for name, value in SD3_KEYS["scheduler"].refused.items() if name != "use_dynamic_shifting"},
            "time_shift_type": "exponential",
        },
    ),
    "model_index": Keys(
        names("transformer vae text_encoder tokenizer scheduler is_distilled"), names(CODE, "image_encoder feature_extractor")
    ),
}
"""The keys by component."""
