"""The architecture of a base from its files. No torch here."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from ..architecture import Architecture
from .known import SHIPPED, BaseEntry, bases_file, named_base
from .published import _TEXT, _UNET, PUBLISHED
from .vetting import check_sizes, read_header, read_index, read_json, unusable_base

_CONSISTENT = ("LCMScheduler", "TCDScheduler")  # samplers of latent consistency models (arXiv 2310.04378)

_CONSISTENT_STEPS = 4

_TEXT_SETTINGS = (  # of the text encoder; others are for training, or for libraries to find code and files by
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
    "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
)  # fmt: skip

_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}


def local_path(name: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    try:
        place = Path(name).expanduser()
        return place if place.is_dir() or place.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name; the home of nobody; a name that cannot be one
        return None


def architecture(base: str) -> Architecture:
    """The architecture of a named base, of a folder in diffusers' format, or of a single file.

    Raises:
        ImagicError: none of them, or as :func:`read_architecture` or :func:`single_architecture`.
    """
    if base in PUBLISHED:
        return PUBLISHED[base]
    known = named_base(base)
    place = local_path(known.source if known else base)
    if place is None:
        raise ImagicError(
            f"no architecture known for {base!r}",
            f"one of {', '.join(SHIPPED)}, a folder in diffusers' format, or a .safetensors file",
            "download it and give its folder",
        )
    return architecture_at(place, known)


def architecture_at(place: Path, known: BaseEntry | None) -> Architecture:
    """The architecture of a base that is there, with what is known of it besides."""
    if place.is_dir() and known and known.config:
        raise ImagicError(f"config of {place}, a folder", "a config for a single file", "leave it out: a folder has its own")
    return with_entry(single_architecture(place, known) if place.is_file() else read_architecture(place), known)


def with_entry(built: Architecture, known: BaseEntry | None) -> Architecture:
    """An architecture with what is known of the base besides its files."""
    if known is None:
        return built
    scheduler = dict(built.scheduler)
    if known.prediction:
        scheduler["prediction_type"] = known.prediction
    if known.few_steps and scheduler["_class_name"] not in _CONSISTENT:
        scheduler["timestep_spacing"] = "trailing"  # as the samplers of distilled bases do: they begin at pure noise
    unet = built.unet | ({"sample_size": known.resolution // built.factor} if known.resolution else {})
    return replace(built, unet=unet, scheduler=scheduler, few_steps=known.few_steps or built.few_steps)


def read_architecture(folder: Path) -> Architecture:
    """What the configs in a folder say.

    Raises:
        ImagicError: one is missing or cannot be read, or they do not describe a Stable Diffusion base.
    """
    index = read_index(folder)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in index]
    files = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"} | dict.fromkeys(encoders, "config.json")
    parts = {part: _DEFAULTS.get(part, {}) | read_json(folder / part / file) for part, file in files.items()}
    for part in encoders:
        parts[part] = {name: parts[part][name] for name in _TEXT_SETTINGS if name in parts[part]}
    parts["scheduler"]["_class_name"] = index["scheduler"][1]
    check_sizes(folder, parts)
    zeros = index.get("force_zeros_for_empty_prompt", True) is True and "text_encoder_2" in index
    steps = _CONSISTENT_STEPS if index["scheduler"][1] in _CONSISTENT else None
    return Architecture(**parts, empty_is_zeros=zeros, few_steps=steps)


_MARKS = {  # a tensor that only checkpoints of a kind have
    "conditioner.embedders.1.model.ln_final.weight": "sdxl",
    "cond_stage_model.model.ln_final.weight": "sd21",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "sd15",
}


def single_architecture(path: Path, known: BaseEntry | None) -> Architecture:
    """The architecture of a checkpoint in the original layout, which brings no configs: those given, or the published ones of its kind.

    Raises:
        ImagicError: a pickle, not such a checkpoint, or one that may predict either noise or velocity and does not say.
    """
    names, said = read_header(path)
    if known and known.config:
        folder = local_path(known.config)
        if known.config not in PUBLISHED and not (folder and folder.is_dir()):
            names = ", ".join(PUBLISHED)
            raise ImagicError(f"config {known.config!r} of {path}", f"one of {names}, or a folder in diffusers' format", "mend it")
        built = PUBLISHED.get(known.config) or read_architecture(folder or path)
        kind = None
    else:
        kind = next((kind for mark, kind in _MARKS.items() if mark in names), None)
        if kind is None and any("lora" in name for name in names):
            raise ImagicError(f"{path} is a LoRA file", "the checkpoint of a base", "give the base that it belongs to")
        if kind is None:
            raise unusable_base(
                f"{path} holds {len(names)} tensors", "a checkpoint of Stable Diffusion 1.x, 2.x or XL in the original layout"
            )
        built = PUBLISHED[kind]
        _check_first_layer(path, kind, names)
    scheduler = dict(built.scheduler)
    told = "v" if "v_pred" in names else said.get("modelspec.prediction_type", "")
    if told.startswith(("v", "eps")):
        scheduler["prediction_type"] = "v_prediction" if told.startswith("v") else "epsilon"
    elif kind == "sd21" and not (known and known.prediction):
        raise ImagicError(
            f"{path} does not say what it predicts, and Stable Diffusion 2 comes in both kinds", "epsilon or v_prediction",
            f"name it in {bases_file()}, with its prediction: see docs/bases.md",
        )  # fmt: skip
    if "ztsnr" in names:
        scheduler["rescale_betas_zero_snr"] = True
    return replace(built, scheduler=scheduler)


def _check_first_layer(path: Path, kind: str, names: dict[str, Any]) -> None:
    """Raises ImagicError for a checkpoint that looks like one of a kind and begins with a layer of another size."""
    first, unet = names.get("model.diffusion_model.input_blocks.0.0.weight"), PUBLISHED[kind].unet
    expected = [unet["block_out_channels"][0], unet["in_channels"], 3, 3]
    if isinstance(first, dict) and first.get("shape") != expected:
        got = f"{path} looks like {kind}, but begins with a layer of shape {reprlib.repr(first.get('shape'))}"
        raise ImagicError(got, f"{expected}", f"if it is right, name it in {bases_file()} with a config: see docs/bases.md")
