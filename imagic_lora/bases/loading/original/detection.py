"""Which model a checkpoint in the original layout is, by the names and shapes of its tensors. This module does not import torch."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....core.errors import ImagicError
from ...architecture import Architecture, KleinArchitecture, SD3ClipArchitecture
from ..known import bases_file
from ..vetting import unusable_base

Header = Mapping[str, Any]
"""Entries of a safetensors header by tensor name."""

UNET = TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g.", "text_encoder_3": "text_encoders.t5xxl.",
}  # fmt: skip
"""Prefixes of the text encoders in a file of Stable Diffusion 3, by component."""
_FAMILIES = {  # key in PUBLISHED by name of a tensor that only checkpoints of this family have
    "conditioner.embedders.1.model.ln_final.weight": "sdxl",
    "cond_stage_model.model.ln_final.weight": "sd21",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "sd15",
    "cond_stage_model.transformer.final_layer_norm.weight": "sd15",  # the names of NovelAI's checkpoint
}
_OTHER_MODELS = {  # by a pattern of tensor names that no supported model has
    r"edm_mean|edm_std": "Playground v2.5, with the noise process of EDM and latents normalised by channel",
    r"edm_vpred\.": "a model with the noise process of EDM, such as CosXL",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?(double_blocks|double_stream_blocks|single_blocks)\.": "a transformer such as FLUX or HunyuanVideo",
    r"(model\.diffusion_model\.)?(clip_txt_mapper|clip_mapper)\.": "Stable Cascade or Würstchen",
    r"(model\.diffusion_model\.)?(cap_embedder|noise_refiner|context_refiner)\.": "Lumina or Z-Image",
    r"(model\.diffusion_model\.)?(text_embedding_padding$|mlp_t5\.)": "Hunyuan-DiT",
    r"(model\.diffusion_model\.)?(encoder_hid_proj|encoder_proj)\.": "Kolors",
    r"(model\.diffusion_model\.)?(y_embedder|caption_projection)\.": "a transformer such as PixArt or Sana",
    r"conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL, or Stable Diffusion 2 in Stability's later layout",
    r"conditioner\.embedders\.0\.open_clip\.": "Stable Video Diffusion",
    r"cond_stage_model\.roberta\.": "AltDiffusion",
    r"cc_projection\.": "Zero123",
    r"depth_model\.": "the depth model of Stable Diffusion 2",
    r"(noise_augmentor|embedder\.model)\.": "unCLIP, which is conditioned on an image",
    r"control_model\.|controlnet_cond_embedding\.": "a ControlNet",
    r"(.*\.)?motion_modules\.": "AnimateDiff",
    r"(.*\.)?transformer_blocks\.\d+\.fuser\.": "GLIGEN",
}
_SD3, _KLEIN = "Stable Diffusion 3", "FLUX.2"
TRANSFORMERS = {
    r"(model\.diffusion_model\.)?joint_blocks\.": (_SD3, "sd35-medium", "tokenizers, and the text encoders that it lacks,"),
    r"(model\.diffusion_model\.)?single_stream_modulation\.": (_KLEIN, "klein-base-4b", "text encoder and VAE"),
}
"""Flow transformers, which load with the other parts of a named base, by a pattern of tensor names: what they are, an example of such a
base, and the parts."""
_SCALED = re.compile(r"text_encoders\..*(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$")
_TEXT_PART = re.compile(r"text_encoders\.|conditioner\.|cond_stage_model\.|text_model\.")
_OTHER_FILES = {  # as _OTHER_MODELS, of files without a known text encoder
    r".*(lora|hada_|lokr_)": "a LoRA file",
    r"(emb_params|string_to_param|clip_[lg])$": "an embedding (textual inversion)",
}
_PARTS = {  # what a file that is no whole checkpoint holds, by a pattern of tensor names
    r"model_ema\.": "the moving average (EMA) of a U-Net",
    r"model\.diffusion_model\.|(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)\.": "a U-Net",
    r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in)": "a VAE",
    r"(cond_stage_model\.|conditioner\.)?.*(text_model|token_embedding|resblocks)": "a text encoder",
}
_ALIKE = {  # models that look like a supported one, by what differs and how
    "in_channels": {8: "an InstructPix2Pix model", 7: "an upscaler", 5: "a depth model"},
    "label_emb": {1536: "unCLIP", 2048: "unCLIP", 2560: "the refiner"},
    "transformer_layers": {
        (0, 2, 4): "SSD-1B", (0, 1, 2): "Segmind-Vega", (2, 5, 0): "KOALA-700M", (2, 6, 0): "KOALA-1B",
    },
}  # fmt: skip


def detected_family(path: Path, tensors: Header) -> str:
    """The key in ``PUBLISHED`` of the family that the tensors belong to.

    Raises:
        ImagicError: the file belongs to another model, or is a part of a checkpoint.
    """
    for pattern, (kind, example, missing) in TRANSFORMERS.items():
        if any(re.match(pattern, name) for name in tensors):
            got = f"{path} is a checkpoint of {kind}, which is read with the {missing} of another base"
            remedy = f"add it to {bases_file()} with parts: {example} (or the base it was made from): see docs/guide/bases.md"
            raise ImagicError(got, "the name of a base that has its other parts", remedy)
    check_other_models(path, tensors)
    if family := next((family for name, family in _FAMILIES.items() if name in tensors), None):
        return family
    check_other_models(path, tensors, _OTHER_FILES)
    expected = "a checkpoint of Stable Diffusion 1.x, 2.x or XL in the original layout, with U-Net, VAE and text encoders"
    if parts := sorted({part for pattern, part in _PARTS.items() if any(re.match(pattern, name) for name in tensors)}):
        remedy = "take the whole checkpoint, or build a folder in diffusers' format from the parts"
        raise ImagicError(f"{path} holds {' and '.join(parts)}, but no text encoder of a known kind", expected, remedy)
    raise unusable_base(f"{path} holds {len(tensors)} tensors, which are of no known model", expected)


def check_other_models(path: Path, tensors: Header, others: Mapping[str, str] = _OTHER_MODELS) -> None:
    """Raises ImagicError, with its name, if the tensors belong to a model that is not supported."""
    for pattern, model in others.items():
        matches = re.compile(pattern).match
        if found := next((name for name in tensors if matches(name)), None):
            got = f"{path} is {model}: it holds {found[:80]!r}"
            raise ImagicError(got, "a checkpoint of Stable Diffusion 1.x, 2.x or XL", "choose another base")


def check_transformer(path: Path, architecture: Architecture, tensors: Header) -> None:
    """Raises ImagicError if a file does not hold the transformer of an architecture, or holds more than the base in parts can have.

    Args:
        path: the file, for messages.
        architecture: that of the base with the other parts.
        tensors: header of the file.
    """
    kinds = {pattern: kind for pattern, (kind, _, _) in TRANSFORMERS.items() if any(re.match(pattern, name) for name in tensors)}
    expected, found = _kind(architecture), next(iter(kinds.values()), None)
    diffusers_names = any(name.removeprefix(TRANSFORMER_PREFIX).startswith("transformer_blocks.") for name in tensors)
    if found != expected and not (found is None and diffusers_names):
        got = f"{path} holds {f'a transformer of {found}' if found else 'no transformer of a known kind'}"
        raise ImagicError(got, f"one of {expected}, as the base in parts has", f"name another base in parts: {bases_file()}")
    _check_text_encoders(path, architecture, tensors)
    vae = next((name for name in tensors if name.startswith(VAE_PREFIX)), None)
    if expected == _KLEIN and vae:
        raise ImagicError(f"{path} holds {vae[:80]!r}, of a VAE", f"a transformer of {_KLEIN} alone", "take the file without VAE")


def _check_text_encoders(path: Path, architecture: Architecture, tensors: Header) -> None:
    """Raises ImagicError if a file with a transformer holds text encoders that the base in parts does not have."""
    three = _kind(architecture) == _SD3 and not isinstance(architecture, SD3ClipArchitecture)
    read = tuple(prefix for part, prefix in TEXT_PREFIXES.items() if three and part in architecture.text_encoders)
    if other := next((name for name in tensors if _TEXT_PART.match(name) and not name.startswith(read)), None):
        known = [prefix.split(".")[1] for prefix in read]
        expected = "a transformer, alone or with its VAE" + (f", and of the text encoders {', '.join(known)} at most" if known else "")
        remedy = "take the file without text encoders, or name another base in parts"
        raise ImagicError(f"{path} holds text encoders, such as {other[:80]!r}", expected, remedy)
    if scale := next((name for name in tensors if _SCALED.match(name)), None):
        got = f"{path} holds {scale[:80]!r}: a text encoder in fp8 with scales"
        raise ImagicError(got, "text encoders in fp16, bf16 or fp32", "take the file without text encoders: parts names the base with them")


def _kind(architecture: Architecture) -> str:
    """The kind of a flow transformer, as in :data:`TRANSFORMERS`."""
    return _KLEIN if isinstance(architecture, KleinArchitecture) else _SD3


def check_unet(path: Path, name: str, architecture: Architecture, tensors: Header) -> None:
    """Raises ImagicError if the U-Net differs from the architecture that it is taken for. Tensors that are missing are not checked.

    Args:
        path: the file, for messages.
        name: of the architecture, for messages.
        architecture: the architecture that the file is taken for.
        tensors: header of the file.
    """
    for what, found, expected in _differences(architecture.denoiser, tensors):
        alike = _ALIKE.get(what, {}).get(found)  # pyright: ignore[reportArgumentType]
        got = f"{path} looks like {name}, but its U-Net has {what} = {reprlib.repr(found)}{f', as {alike} has' if alike else ''}"
        remedy = f"choose another base, or add this one to {bases_file()} with a matching config: see docs/guide/bases.md"
        raise ImagicError(got, f"{what} = {expected}", remedy)


def first_layer(tensors: Header) -> list[int]:
    """Shape of the first layer of the U-Net; empty if there is none."""
    return _shape(tensors, "input_blocks.0.0.weight")


def _differences(unet: Mapping[str, Any], tensors: Header) -> Iterator[tuple[str, Any, Any]]:
    """Yields what differs between a U-Net's config and its tensors: its name, its value in the file, and the expected one."""
    first, last = first_layer(tensors), _shape(tensors, "out.2.weight")
    added, context = _shape(tensors, "label_emb.0.0.weight"), _shape(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    values = {
        "in_channels": (first[1:2], unet["in_channels"]),
        "model_channels": (first[:1], unet["block_out_channels"][0]),
        "out_channels": (last[:1], unet["out_channels"]),
        "cross_attention_dim": (context[1:2], unet["cross_attention_dim"]),
    }
    for what, (found, expected) in values.items():
        if found and found[0] != expected:
            yield what, found[0], expected
    given = unet.get("projection_class_embeddings_input_dim")
    if added and added[1:2] != [given]:
        yield "label_emb", added[-1], given
    guidance = next(iter(_shape(tensors, "time_embed.cond_proj.weight")[1:2]), None)
    if first and guidance != unet.get("time_cond_proj_dim"):
        yield "time_cond_proj_dim", guidance, unet.get("time_cond_proj_dim")
    layers = _transformer_layers(tensors, len(unet["block_out_channels"]), unet["layers_per_block"])
    expected_layers = _expected_layers(unet)
    if layers and layers != expected_layers:
        yield "transformer_layers", layers, expected_layers


def _shape(tensors: Header, name: str) -> list[int]:
    """Shape of a tensor of the U-Net; empty if there is none."""
    entry = tensors.get(UNET + name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return shape if isinstance(shape, list) else []


def _transformer_layers(tensors: Header, levels: int, per_level: int) -> tuple[int, ...]:
    """Number of transformer layers of each level of the input blocks, from the tensor names; empty if the file holds no such blocks."""
    pattern = re.compile(re.escape(UNET) + r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.")
    depths = [0] * levels
    matches = [match for name in tensors if (match := pattern.match(name))]
    for match in matches:
        level = (int(match[1]) - 1) // (per_level + 1)
        if level < levels:
            depths[level] = max(depths[level], int(match[2]) + 1)
    return tuple(depths) if matches else ()


def _expected_layers(unet: Mapping[str, Any]) -> tuple[int, ...]:
    levels = unet["down_block_types"]
    depth = unet.get("transformer_layers_per_block", 1)
    depths = depth if isinstance(depth, list) else [depth] * len(levels)
    return tuple(layers if level.startswith("CrossAttn") else 0 for layers, level in zip(depths, levels, strict=False))
