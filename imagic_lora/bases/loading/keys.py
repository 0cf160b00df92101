"""Every key of the configs of diffusers and transformers: honoured, harmless, or refused. This module does not import torch.

A key that could change images and that nothing here honours is refused by its name, and so is a key that nobody has sorted yet.
``docs/internals/config-keys.md`` explains the lists; ``tests/bases/test_keys.py`` fails when diffusers or transformers add a key.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError


@dataclass(frozen=True)
class Keys:
    """The keys that one config can have. A key of no list is refused. A key with the value None, or with a leading underscore, is accepted.

    Args:
        honoured: read here, or passed to the class that diffusers passes them to.
        harmless: change neither an image nor what is trained.
        refused: nothing here honours them; by key the only value that is accepted, because it has no effect.
    """

    honoured: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, Any] = field(default_factory=dict[str, Any])


def names(*texts: str) -> frozenset[str]:
    """The words of texts."""
    return frozenset(name for text in texts for name in text.split())


CODE = "auto_map trust_remote_code"
"""Keys that name code, which is never run."""
QUANTIZED: dict[str, Any] = {"quantization_config": None}
"""Keys of quantized weights, which are refused."""

KEYS: dict[str, Keys] = {
    "unet": Keys(
        names(
            "sample_size in_channels out_channels block_out_channels layers_per_block down_block_types mid_block_type up_block_types",
            "cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block attention_head_dim upcast_attention",
            "only_cross_attention mid_block_only_cross_attention use_linear_projection cross_attention_norm dropout act_fn norm_num_groups",
            "norm_eps center_input_sample flip_sin_to_cos freq_shift downsample_padding mid_block_scale_factor conv_in_kernel",
            "conv_out_kernel resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_dim",
            "time_embedding_act_fn timestep_post_act time_cond_proj_dim addition_embed_type addition_time_embed_dim",
            "addition_embed_type_num_heads projection_class_embeddings_input_dim",
        ),
        # settings of the moving average of a training, which diffusers' scripts store with the weights
        names(CODE, "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup"),
        {  # inputs and layers that no pipeline here feeds
            "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
            "class_embeddings_concat": False, "attention_type": "default", "dual_cross_attention": False, "num_attention_heads": None,
        } | QUANTIZED,
    ),
    "vae": Keys(
        names(
            "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn latent_channels",
            "norm_num_groups scaling_factor force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention",
        ),
        names(CODE, "sample_size"),  # only the size of tiles
        {"shift_factor": None, "latents_mean": None, "latents_std": None} | QUANTIZED,
    ),
    "text_encoder": Keys(
        names(
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act",
            "layer_norm_eps bos_token_id eos_token_id pad_token_id projection_dim use_attention_mask",
        ),
        names(
            CODE, "architectures model_type transformers_version dtype torch_dtype name_or_path",
            "attn_implementation experts_implementation",
            "attention_dropout dropout initializer_factor initializer_range",  # training
            "output_hidden_states output_attentions return_dict use_return_dict torchscript use_bfloat16 chunk_size_feed_forward",
            "is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder tie_word_embeddings",
            "decoder_start_token_id sep_token_id prefix task_specific_params tokenizer_class problem_type finetuning_task",
            "id2label label2id num_labels tf_legacy_loss rope_scaling rope_theta",  # CLIP has no rotary embeddings
            # generation of texts
            "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample",
            "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff",
            "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length",
            "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences",
            "output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature",
            "top_k top_p typical_p use_cache",
        ),
        {"pruned_heads": {}, "per_layer_config": None, "transformers_weights": None} | QUANTIZED,
    ),
    "tokenizer": Keys(
        names(
            "bos_token eos_token unk_token pad_token additional_special_tokens extra_special_tokens added_tokens_decoder",
            "model_max_length max_len",
        ),
        names(
            # transformers gives every CLIP tokenizer the same normalizer, pre-tokenizer and post-processor
            CODE, "do_lower_case add_prefix_space errors add_bos_token add_eos_token clean_up_tokenization_spaces",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output model_input_names verbose",
            "tokenizer_class processor_class backend use_fast from_slow legacy is_local local_files_only name_or_path files_loaded",
            "vocab_file merges_file tokenizer_file special_tokens_map_file tokenizer_config_file",  # replaced by the files of the folder
            "chat_template response_template response_schema chat_control_tokens",
        ),
        {
            "padding_side": "right", "truncation_side": "right", "split_special_tokens": False, "sep_token": None, "cls_token": None,
            "mask_token": None, "init_inputs": [], "fast_tokenizer_files": ["tokenizer.json"], "model_specific_special_tokens": {},
            # arguments that replace the vocabulary or parts of the tokenizer
            "vocab": None, "merges": None, "unk_id": None, "tokenizer": None, "tokenizer_object": None, "tokenizer_padding": None,
            "tokenizer_truncation": None, "post_processor": None, "gguf_file": None, "fix_mistral_regex": False,
        },
    ),
    "scheduler": Keys(
        names(
            "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr timestep_spacing",
            "steps_offset clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value set_alpha_to_one",
            "skip_prk_steps variance_type algorithm_type solver_order solver_type solver_p predictor_order corrector_order predict_x0",
            "disable_corrector lower_order_final euler_at_final final_sigmas_type lambda_min_clipped interpolation_type use_karras_sigmas",
            "use_exponential_sigmas use_beta_sigmas use_lu_lambdas sigma_min sigma_max original_inference_steps timestep_scaling",
            "noise_sampler_seed",
        ),
        names(CODE, "tensor_format flow_shift time_shift_type"),  # the last two do nothing without use_flow_sigmas
        {  # the noise processes of flow matching and EDM, and code
            "use_flow_sigmas": False, "use_dynamic_shifting": False, "shift_terminal": None, "timestep_type": "discrete", "tau_func": None,
        },
    ),
    "model_index": Keys(
        names("unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler force_zeros_for_empty_prompt"),
        names(CODE, "safety_checker feature_extractor image_encoder requires_safety_checker add_watermarker"),
        {"requires_aesthetics_score": False},
    ),
}  # fmt: skip
"""The keys by component. Second text encoders and tokenizers have those of the first; special_tokens_map.json has those of a tokenizer."""


def check_keys(path: Path, keys: Keys, config: Mapping[str, Any]) -> None:
    """Checks that every key of a config is honoured or harmless.

    Args:
        path: file of the config, for messages.
        keys: those that the config can have.
        config: content of the file.

    Raises:
        ImagicError: a key could change images and is honoured by nothing here, or is unknown.
    """
    for name, expected in _unsupported(keys, config):
        got = f"{path} has {name[:60]} = {reprlib.repr(config[name])}, which is not supported"
        raise ImagicError(got, expected, "choose another base; if the setting has no effect on this one, remove it from the file")


def _unsupported(keys: Keys, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the keys of a config that are neither honoured nor harmless, and what is expected instead."""
    for name, value in config.items():
        if value is None or name.startswith("_") or name in keys.honoured | keys.harmless:
            continue
        if name not in keys.refused:
            yield name, "only known settings"
        elif type(value) is not type(keys.refused[name]) or value != keys.refused[name]:
            yield name, f"{json.dumps(keys.refused[name])}, or no such setting"
