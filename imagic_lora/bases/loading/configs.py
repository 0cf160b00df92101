"""Reads the architecture of a base from its files. This module does not import torch."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError, unreadable
from ..architecture import Architecture
from .known import SHIPPED, BaseEntry, bases_file, named_base
from .published import _TEXT, _UNET, PUBLISHED
from .vetting import check_sizes, read_header, read_index, read_json, unusable_base

_CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")  # of latent consistency models (arXiv 2310.04378)
_CONSISTENCY_STEPS = 4  # sampling steps of a consistency model whose entry names none

_TEXT_SETTINGS = (  # the only settings kept of a text encoder's config: others concern training, or name code and files to load
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
    "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
)  # fmt: skip

_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}


def local_path(name: str) -> Path | None:
    """The path ``name``, with ``~`` expanded, if it is an existing folder or file; otherwise None.

    Raises:
        ImagicError: a folder on the way to it may not be read.
    """
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except PermissionError as error:
        raise unreadable(name, error) from error
    except (OSError, RuntimeError, ValueError):  # a name that is too long; "~" of an unknown user; a null byte
        return None


def architecture(base: str) -> Architecture:
    """The architecture of a built-in or local base. Nothing is downloaded.

    Args:
        base: name of a base, folder in diffusers' format, or single file.

    Raises:
        ImagicError: ``base`` is none of these; as :func:`read_architecture` or :func:`single_architecture`.
    """
    if base in PUBLISHED:
        return PUBLISHED[base]
    entry = named_base(base)
    path = local_path(entry.source if entry else base)
    if path is None:
        raise ImagicError(
            f"no architecture is known for {base!r}",
            f"one of {', '.join(SHIPPED)}, a folder in diffusers' format, or a .safetensors file",
            "download the base and give its folder",
        )
    return architecture_at(path, entry)


def architecture_at(path: Path, entry: BaseEntry | None) -> Architecture:
    """The architecture of the base at an existing path, with the settings of its entry.

    Raises:
        ImagicError: the entry of a folder sets ``config``; as :func:`read_architecture` or :func:`single_architecture`.
    """
    if path.is_dir() and entry and entry.config:
        got = f"config = {entry.config!r} for the folder {path}"
        raise ImagicError(got, "config only for a single file", "remove config: a folder has its own configs")
    return with_entry(single_architecture(path, entry) if path.is_file() else read_architecture(path), entry)


def with_entry(architecture: Architecture, entry: BaseEntry | None) -> Architecture:
    """The architecture with the prediction type, resolution and number of sampling steps of a base's entry, where it sets them."""
    if entry is None:
        return architecture
    scheduler = dict(architecture.scheduler)
    if entry.prediction:
        scheduler["prediction_type"] = entry.prediction
    if entry.few_steps and scheduler["_class_name"] not in _CONSISTENCY_SCHEDULERS:
        scheduler["timestep_spacing"] = "trailing"  # distilled bases sample from the last timestep, which is pure noise
    unet = architecture.unet
    if entry.resolution:
        unet = unet | {"sample_size": entry.resolution // architecture.vae_scale_factor}
    return replace(architecture, unet=unet, scheduler=scheduler, few_steps=entry.few_steps or architecture.few_steps)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a folder in diffusers' format.

    Raises:
        ImagicError: a config is missing or cannot be read; the configs do not describe a Stable Diffusion base.
    """
    index = read_index(folder)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in index]
    files = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"} | dict.fromkeys(encoders, "config.json")
    parts = {part: _DEFAULTS.get(part, {}) | read_json(folder / part / file) for part, file in files.items()}
    for part in encoders:
        parts[part] = {name: parts[part][name] for name in _TEXT_SETTINGS if name in parts[part]}
    parts["scheduler"]["_class_name"] = index["scheduler"][1]
    check_sizes(folder, parts)
    empty_is_zeros = index.get("force_zeros_for_empty_prompt", True) is True and "text_encoder_2" in index
    steps = _CONSISTENCY_STEPS if index["scheduler"][1] in _CONSISTENCY_SCHEDULERS else None
    return Architecture(**parts, empty_is_zeros=empty_is_zeros, few_steps=steps)


_FAMILY_TENSORS = {  # by name of a tensor that only checkpoints of this family have
    "conditioner.embedders.1.model.ln_final.weight": "sdxl",
    "cond_stage_model.model.ln_final.weight": "sd21",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "sd15",
}


def single_architecture(path: Path, entry: BaseEntry | None) -> Architecture:
    """The architecture of a single file in the original layout, which contains no configs.

    The configs are those that the entry names, otherwise the published ones of the family, which is detected from the tensor names. The
    prediction type is read from a tensor ``v_pred`` or from ``modelspec.prediction_type`` in the metadata. A tensor ``ztsnr`` means a
    noise schedule with zero terminal signal-to-noise ratio (arXiv 2305.08891).

    Raises:
        ImagicError: the file is a pickle or no such checkpoint; it belongs to Stable Diffusion 2 and neither the file nor the entry states
            the prediction type; the entry's config does not exist.
    """
    tensors, metadata = read_header(path)
    if entry and entry.config:
        family, architecture = None, _given_architecture(path, entry.config)
    else:
        family = _detected_family(path, tensors)
        architecture = PUBLISHED[family]
        _check_first_layer(path, family, tensors)
    scheduler = dict(architecture.scheduler)
    prediction = "v" if "v_pred" in tensors else metadata.get("modelspec.prediction_type", "")
    if prediction.startswith(("v", "eps")):
        scheduler["prediction_type"] = "v_prediction" if prediction.startswith("v") else "epsilon"
    elif family == "sd21" and not (entry and entry.prediction):
        raise ImagicError(
            f"{path} does not state its prediction type, and Stable Diffusion 2 exists with both", "epsilon or v_prediction",
            f"add the file to {bases_file()}, with its prediction: see docs/guide/bases.md",
        )  # fmt: skip
    if "ztsnr" in tensors:
        scheduler["rescale_betas_zero_snr"] = True
    return replace(architecture, scheduler=scheduler)


def _given_architecture(path: Path, config: str) -> Architecture:
    """The architecture that the entry of a single file names: a published one or that of a folder."""
    folder = local_path(config)
    if config not in PUBLISHED and not (folder and folder.is_dir()):
        raise ImagicError(
            f"config {config!r} of {path}", f"one of {', '.join(PUBLISHED)}, or a folder in diffusers' format", f"correct {bases_file()}"
        )
    return PUBLISHED.get(config) or read_architecture(folder or path)


def _detected_family(path: Path, tensors: dict[str, Any]) -> str:
    """The key in ``PUBLISHED`` of the family that the tensor names belong to."""
    family = next((family for name, family in _FAMILY_TENSORS.items() if name in tensors), None)
    if family is None and any("lora" in name for name in tensors):
        raise ImagicError(f"{path} is a LoRA file", "the checkpoint of a base", "give the base that the LoRA belongs to")
    if family is None:
        raise unusable_base(
            f"{path} holds {len(tensors)} tensors, which are of no known model",
            "a checkpoint of Stable Diffusion 1.x, 2.x or XL in the original layout",
        )
    return family


def _check_first_layer(path: Path, family: str, tensors: dict[str, Any]) -> None:
    """Raises ImagicError if the first convolution of the U-Net has another shape than in the family, as in inpainting checkpoints."""
    first, unet = tensors.get("model.diffusion_model.input_blocks.0.0.weight"), PUBLISHED[family].unet
    expected = [unet["block_out_channels"][0], unet["in_channels"], 3, 3]
    if isinstance(first, dict) and first.get("shape") != expected:
        got = f"{path} looks like {family}, but the first layer of its U-Net has the shape {reprlib.repr(first.get('shape'))}"
        remedy = f"use another checkpoint, or add this one to {bases_file()} with a matching config: see docs/guide/bases.md"
        raise ImagicError(got, f"{expected}", remedy)
