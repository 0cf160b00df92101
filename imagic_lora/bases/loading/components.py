"""Builds the models and tokenizers of a base from vetted JSON and safetensors files.

The ``from_pretrained`` methods of diffusers and transformers never see the files of a base: they follow references in configs to other
files, other repositories and other libraries. Here the classes are fixed, and no file of a base selects code to execute or files to read.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.modeling_utils import no_init_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..layers import text_parameters
from .files import Files, cast_finite
from .vetting import library_errors, unusable_base

TEXT_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_PROBE = "a1~\u4e00"  # includes characters that some vocabularies lack


def model(
    model_class: type[UNet2DConditionModel] | type[AutoencoderKL], config: dict[str, Any], files: Files, part: str, dtype: torch.dtype
) -> Any:
    """A U-Net or a VAE with the weights of its files.

    Args:
        model_class: class of the model.
        config: vetted config.
        files: files of the base.
        part: component name, ``unet`` or ``vae``.
        dtype: precision of the weights.

    Raises:
        ImagicError: the model cannot be built from the config; tensors are missing, unexpected, of another shape or not finite.
    """
    path = files.component_path(part)
    with library_errors(path), torch.device("meta"), no_init_weights():
        module: Any = model_class.from_config(config)
    state = files.tensors(part)
    module._fix_state_dict_keys_on_load(state)  # renames outdated names, which the VAE of Stable Diffusion 1.5 has
    expected = {name: value.shape for name, value in module.state_dict().items()}
    _check_names_and_shapes(expected, {name: value.shape for name, value in state.items()}, path)
    module.load_state_dict(cast_finite(state, dtype, path), assign=True)
    if any(buffer.is_meta for buffer in module.buffers()):
        raise unusable_base(f"{path} has buffers that no weight file contains", "a U-Net or VAE of Stable Diffusion")
    return module


def _check_names_and_shapes(expected: dict[str, torch.Size], actual: dict[str, torch.Size], path: Path) -> None:
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    misshapen = [name for name in expected if name in actual and expected[name] != actual[name]]
    problems = ((missing, "are missing"), (extra, "are not in its config"), (misshapen, "have another shape than in its config"))
    for names, problem in problems:
        if names:
            raise unusable_base(
                f"{len(names)} tensors of {path} {problem}, for example {names[0][:80]!r}", "the weights that the config describes"
            )


def text_encoder(config: dict[str, Any], files: Files, part: str, dtype: torch.dtype) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder. transformers gets its weights as tensors and reads no file.

    Args:
        config: vetted config.
        files: files of the base.
        part: component name, ``text_encoder`` or ``text_encoder_2``.
        dtype: precision of the weights.

    Raises:
        ImagicError: as :func:`model`.
    """
    path, state = files.component_path(part), files.tensors(part)
    actual, expected = sum(value.numel() for value in state.values()), text_parameters(config, projects=part == "text_encoder_2")
    if actual != expected:
        raise unusable_base(f"{path} holds {actual:,} weights", f"the {expected:,} that its config describes")
    with library_errors(path):
        loaded: Any = TEXT_ENCODERS[part].from_pretrained(
            None, config=CLIPTextConfig(**config), state_dict=cast_finite(state, dtype, path), dtype=dtype, output_loading_info=True
        )
    module, loading_info = loaded
    if any(loading_info.values()):
        name = next(name for names in loading_info.values() for name in names)
        raise unusable_base(
            f"{path} does not hold the tensors of a CLIP text encoder: problem with {str(name)[:80]!r}",
            "the weights that the config describes",
        )
    return module


def tokenizer(text: dict[str, Any], files: Files, part: str) -> CLIPTokenizer:
    """A tokenizer, read from a temporary folder that holds only vetted files.

    Args:
        text: config of the text encoder that the tokenizer belongs to.
        files: files of the base.
        part: component name, ``tokenizer`` or ``tokenizer_2``.

    Raises:
        ImagicError: the tokenizer cannot be read, or its ids or lengths do not match the text encoder.
    """
    path, length, vocabulary_size = files.component_path(part), text["max_position_embeddings"], text["vocab_size"]
    with TemporaryDirectory() as copy, library_errors(path):
        for name, content in files.tokenizer(part).items():
            Path(copy, name).write_text(content, encoding="utf-8")
        clip = CLIPTokenizer.from_pretrained(copy, local_files_only=True)
        if padding := files.padding(part):
            clip.pad_token = padding  # after the tokenizer is built, which would otherwise take it out of every prompt
        if clip.model_max_length < length:
            raise unusable_base(
                f"{path} has the model_max_length {clip.model_max_length}",
                f"at least {length}, the max_position_embeddings of the text encoder",
            )
        clip.model_max_length = length
        ids = clip(_PROBE, padding="max_length", max_length=length, truncation=True).input_ids
        highest = max(clip.get_vocab().values())
    if len(ids) != length or length < 3 or ids[0] != clip.bos_token_id:
        raise unusable_base(
            f"{path} encodes a prompt as {len(ids)} tokens that begin with {ids[:1]}", f"{length} tokens that begin with CLIP's start token"
        )
    if highest >= vocabulary_size:
        raise unusable_base(f"{path} has the token id {highest}", f"ids below {vocabulary_size}, the vocab_size of the text encoder")
    return clip
