"""Builds the models and tokenizers of a base from vetted JSON and safetensors files.

The ``from_pretrained`` methods of diffusers and transformers never see the files of a base: they follow references in configs to other
files, other repositories and other libraries. Here the classes are fixed, and no file of a base selects code to execute or files to read.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ..architecture import KLEIN_LENGTH, SD3_T5_LENGTH, Architecture
from ..layers import text_parameters
from .files import Files, cast_finite
from .tokenizers import QWEN_START
from .vetting import library_errors, unusable_base


class Qwen3Layers(Qwen3Model):
    """The first layers of Qwen3, whose last output is that of a layer: the norm comes after layers that are not loaded."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.norm = torch.nn.Identity()


TEXT_ENCODERS: dict[str, tuple[Any, Any]] = {
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
    "T5EncoderModel": (T5Config, T5EncoderModel),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3Layers),
}
"""Classes of transformers by name: of the config, and of the model."""
_PROBE = "a1~\u4e00"  # includes characters that some vocabularies lack


def tokenizer_of(encoder: str) -> str:
    """Component name of the tokenizer of a text encoder: ``tokenizer_2`` for ``text_encoder_2``."""
    return encoder.replace("text_encoder", "tokenizer")


def vae_dtype(architecture: Architecture, dtype: torch.dtype) -> torch.dtype:
    """Precision of the VAE: ``dtype``, but fp32 instead of fp16 for a VAE that overflows in fp16 and would decode to black images."""
    return torch.float32 if architecture.vae_overflows_fp16 and dtype == torch.float16 else dtype


def model(model_class: Any, config: dict[str, Any], files: Files, part: str, dtype: torch.dtype) -> Any:
    """A denoiser or a VAE with the weights of its files.

    Args:
        model_class: class of the model.
        config: vetted config.
        files: files of the base.
        part: component name, such as ``unet``.
        dtype: precision of the weights.

    Raises:
        ImagicError: the model cannot be built from the config; tensors are missing, unexpected, of another shape or not finite.
    """
    path = files.component_path(part)
    with library_errors(path), torch.device("meta"), no_init_weights():
        module: Any = model_class.from_config(config)
    state = files.tensors(part)
    module._fix_state_dict_keys_on_load(state)  # renames outdated names, which the VAE of Stable Diffusion 1.5 has
    counters = {name: torch.zeros((), dtype=torch.int64) for name in module.state_dict() if name.endswith("num_batches_tracked")}
    expected = {name: value.shape for name, value in module.state_dict().items() if name not in counters}
    _check_names_and_shapes(expected, {name: value.shape for name, value in state.items()}, path)
    module.load_state_dict(cast_finite(state, dtype, path) | counters, assign=True)
    if any(buffer.is_meta for buffer in module.buffers()):
        raise unusable_base(f"{path} has buffers that no weight file contains", "a denoiser or VAE of Stable Diffusion")
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


def text_encoder(kind: str, config: dict[str, Any], files: Files, part: str, dtype: torch.dtype) -> Any:
    """A text encoder. transformers gets its weights as tensors and reads no file.

    Args:
        kind: its class, a key of :data:`TEXT_ENCODERS`.
        config: vetted config.
        files: files of the base.
        part: component name, such as ``text_encoder``.
        dtype: precision of the weights.

    Raises:
        ImagicError: as :func:`model`.
    """
    path, state = files.component_path(part), files.tensors(part)
    actual, expected = sum(value.numel() for value in state.values()), text_parameters(config, kind)
    if actual != expected:
        raise unusable_base(f"{path} holds {actual:,} weights", f"the {expected:,} that its config describes")
    with library_errors(path):
        config_class, model_class = TEXT_ENCODERS[kind]
        loaded: Any = model_class.from_pretrained(
            None, config=config_class(**config), state_dict=cast_finite(state, dtype, path), dtype=dtype, output_loading_info=True
        )
    module, loading_info = loaded
    if any(loading_info.values()):
        name = next(name for names in loading_info.values() for name in names)
        raise unusable_base(
            f"{path} does not hold the tensors of the text encoder {kind}: problem with {str(name)[:80]!r}",
            "the weights that the config describes",
        )
    return module


def tokenizer(kind: str, text: dict[str, Any], files: Files, part: str) -> Any:
    """A tokenizer, read from a temporary folder that holds only vetted files.

    Args:
        kind: class of the text encoder that the tokenizer belongs to.
        text: config of that text encoder.
        files: files of the base.
        part: component name, such as ``tokenizer``.

    Raises:
        ImagicError: the tokenizer cannot be read, or its ids or lengths do not match the text encoder.
    """
    return {"T5EncoderModel": _t5_tokenizer, "Qwen3ForCausalLM": _qwen_tokenizer}.get(kind, _clip_tokenizer)(text, files, part)


def _from_vetted(tokenizer_class: Any, files: Files, part: str) -> Any:
    """A tokenizer of this class, from a temporary folder that holds only the vetted files of a component."""
    with TemporaryDirectory() as copy:
        for name, content in files.tokenizer(part).items():
            Path(copy, name).write_text(content, encoding="utf-8")
        return tokenizer_class.from_pretrained(copy, local_files_only=True)


def _check_ids(path: Path, highest: int, vocabulary_size: int) -> None:
    """Raises ImagicError if a tokenizer has ids for which the text encoder has no embedding."""
    if highest >= vocabulary_size:
        raise unusable_base(f"{path} has the token id {highest}", f"ids below {vocabulary_size}, the vocab_size of the text encoder")


def _qwen_tokenizer(text: dict[str, Any], files: Files, part: str) -> Qwen2Tokenizer:
    """As :func:`tokenizer`, with the number of tokens that the denoiser takes."""
    path, vocabulary_size = files.component_path(part), text["vocab_size"]
    with library_errors(path):
        qwen: Qwen2Tokenizer = _from_vetted(Qwen2Tokenizer, files, part)
        qwen.model_max_length = KLEIN_LENGTH
        ids = qwen(_PROBE, padding="max_length", max_length=KLEIN_LENGTH, truncation=True).input_ids
        start, highest, padding = qwen(QWEN_START).input_ids, max(qwen.get_vocab().values()), qwen.pad_token_id
    if len(ids) != KLEIN_LENGTH or ids[-1] != padding or len(start) != 1:
        got = f"{path} encodes a prompt as {len(ids)} tokens that end with {ids[-1:]}, and the start of a message as {len(start)}"
        raise unusable_base(got, f"{KLEIN_LENGTH} tokens that end with padding, and one token")
    _check_ids(path, highest, vocabulary_size)
    return qwen


def _t5_tokenizer(text: dict[str, Any], files: Files, part: str) -> T5Tokenizer:
    """As :func:`tokenizer`, with the number of tokens that the denoiser takes."""
    path, vocabulary_size = files.component_path(part), text["vocab_size"]
    with library_errors(path):
        t5: T5Tokenizer = _from_vetted(T5Tokenizer, files, part)
        t5.model_max_length = SD3_T5_LENGTH
        ids = t5(_PROBE, padding="max_length", max_length=SD3_T5_LENGTH, truncation=True).input_ids
        highest, end, padding = max(t5.get_vocab().values()), t5.eos_token_id, t5.pad_token_id
    if len(ids) != SD3_T5_LENGTH or end not in ids or ids[-1] != padding:
        raise unusable_base(f"{path} encodes a prompt as {len(ids)} tokens that end with {ids[-1:]}", "T5's end token and padding")
    _check_ids(path, highest, vocabulary_size)
    return t5


def _clip_tokenizer(text: dict[str, Any], files: Files, part: str) -> CLIPTokenizer:
    """As :func:`tokenizer`."""
    path, length, vocabulary_size = files.component_path(part), text["max_position_embeddings"], text["vocab_size"]
    with library_errors(path):
        clip: CLIPTokenizer = _from_vetted(CLIPTokenizer, files, part)
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
    _check_ids(path, highest, vocabulary_size)
    return clip
