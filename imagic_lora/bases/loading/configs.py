"""Reads the architecture of a base from its files. This module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from ..architecture import Architecture
from .keys import KEYS, check_keys
from .known import SHIPPED, BaseEntry, bases_file, known_base, local_path
from .original.architecture import single_architecture
from .published import _TEXT, _UNET, PUBLISHED
from .vetting import check_sizes, read_index, read_json, unusable_base

_CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")  # of latent consistency models (arXiv 2310.04378)
_CONSISTENCY_STEPS = 4  # sampling steps of a consistency model whose entry names none

_CORRECTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # pipelines that correct outdated configs when they are loaded
_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}


def architecture(base: str) -> Architecture:
    """The architecture of a built-in or local base. Nothing is downloaded.

    Args:
        base: name of a base, folder in diffusers' format, or single file.

    Raises:
        ImagicError: ``base`` is none of these; as :func:`read_architecture` or :func:`single_architecture`.
    """
    known = known_base(base)
    path = local_path(known.source)
    if path is None and known.built_in:
        return with_entry(PUBLISHED[known.built_in], known.entry)
    if path is None:
        raise ImagicError(
            f"no architecture is known for {base!r}",
            f"one of {', '.join(SHIPPED)}, a folder in diffusers' format, or a .safetensors file",
            "download the base and give its folder",
        )
    return architecture_at(path, known.entry)


def architecture_at(path: Path, entry: BaseEntry | None) -> Architecture:
    """The architecture of the base at an existing path, with the settings of its entry.

    Raises:
        ImagicError: the entry of a folder sets ``config``; as :func:`read_architecture` or :func:`single_architecture`.
    """
    if path.is_dir() and entry and entry.config:
        got = f"config = {entry.config!r} for the folder {path}"
        raise ImagicError(got, "config only for a single file", "remove config: a folder has its own configs")
    if path.is_dir():
        return with_entry(read_architecture(path), entry)
    given = _given_architecture(path, entry.config) if entry and entry.config else None
    return with_entry(single_architecture(path, entry, given), entry)


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
    parts: dict[str, dict[str, Any]] = {}
    for part, file in files.items():
        config, kind = read_json(folder / part / file), part.removesuffix("_2")
        check_keys(folder / part / file, KEYS[kind], config)
        # transformers would read more of a text encoder's config: names of code and files to load
        read = {name: config[name] for name in config if name in KEYS[kind].honoured} if part in encoders else config
        parts[part] = _DEFAULTS.get(part, {}) | read
    parts["scheduler"]["_class_name"] = index["scheduler"][1]
    check_sizes(folder, parts)
    corrects = index["_class_name"] in _CORRECTING
    parts["unet"] = _corrected(parts["unet"], corrects)
    if parts["scheduler"].get("clip_sample") and not corrects and "text_encoder_2" not in index:
        raise unusable_base(f"{folder} has a {index['_class_name']} with clip_sample", "clip_sample = false")
    empty_is_zeros = index.get("force_zeros_for_empty_prompt", True) is True and "text_encoder_2" in index
    steps = _CONSISTENCY_STEPS if index["scheduler"][1] in _CONSISTENCY_SCHEDULERS else None
    return Architecture(**parts, empty_is_zeros=empty_is_zeros, few_steps=steps)


def _corrected(unet: dict[str, Any], corrects: bool) -> dict[str, Any]:
    """The config of a U-Net after the correction of its size by diffusers' pipelines of Stable Diffusion 1 and 2.

    Versions of diffusers before 0.9 stored the size of another model; the pipelines replace it by 64 when they are loaded. The version is
    removed from the config, so that a resolution that the user's list states is not corrected too.

    Args:
        unet: the config as it is stored.
        corrects: whether the pipeline that the base names corrects it.
    """
    version = str(unet.get("_diffusers_version", "")).split(".")[:2]
    outdated = len(version) == 2 and all(part.isdecimal() for part in version) and [int(part) for part in version] < [0, 9]
    if outdated and corrects and unet["sample_size"] < 64:
        unet = unet | {"sample_size": 64}
    return {name: value for name, value in unet.items() if name != "_diffusers_version"}


def _given_architecture(path: Path, config: str) -> Architecture:
    """The architecture that the entry of a single file names: a published one or that of a folder."""
    folder = local_path(config)
    if config not in PUBLISHED and not (folder and folder.is_dir()):
        raise ImagicError(
            f"config {config!r} of {path}", f"one of {', '.join(PUBLISHED)}, or a folder in diffusers' format", f"correct {bases_file()}"
        )
    return PUBLISHED.get(config) or read_architecture(folder or path)
