"""Reads the architecture of a base from its files. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from ...core.settings.recipes import Recipe, recipe_of
from ..architecture import KLEIN_LAYERS, Architecture, KleinArchitecture, SD3Architecture, SD3ClipArchitecture, UNetArchitecture
from .keys import Keys, check_keys
from .known import SHIPPED, BaseEntry, KnownBase, bases_file, check_embedded, known_base, local_path
from .original.architecture import single_architecture
from .original.detection import check_transformer
from .published import _SD3, _T5, _TEXT, _UNET, PUBLISHED
from .sizes import check_klein_sizes, check_sd3_sizes, check_sizes, rope_theta
from .vetting import FLOW_FAMILIES, keys_of, read_header, read_index, read_json, unusable_base

_CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")  # of latent consistency models (arXiv 2310.04378)
_CONSISTENCY_STEPS = 4  # sampling steps of a consistency model whose entry names none
_KLEIN_STEPS = 4  # of the distilled FLUX.2 klein

_CORRECTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # pipelines that correct outdated configs when they are loaded
_CORRECTING_SIZES = (*_CORRECTING, "StableDiffusionInpaintPipeline")
_CLIPPING = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")  # whose default is clip_sample = true
_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}
_SD3_DEFAULTS = {**_DEFAULTS, "transformer": _SD3, "text_encoder_3": _T5}


def architecture(base: str) -> Architecture:
    """The architecture of a built-in or local base. Nothing is downloaded.

    Args:
        base: name of a base, folder in diffusers' format, or single file.

    Raises:
        ImagicError: ``base`` is none of these, or an embedded base without weights; as :func:`read_architecture` or
            :func:`single_architecture`.
    """
    known = known_base(base)
    check_embedded(known)
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
        return with_entry(read_architecture(path, folder_of_parts(entry)), entry)
    if entry and entry.parts:
        return _of_transformer(path, entry)
    given = _given_architecture(path, entry.config) if entry and entry.config else None
    return with_entry(single_architecture(path, entry, given), entry)


def _of_transformer(path: Path, entry: BaseEntry) -> Architecture:
    """The architecture of a file with a flow transformer: that of the base which has the other parts."""
    if entry.config:
        got = f"config and parts for the file {path}"
        raise ImagicError(got, "one of them: parts for a transformer, config for a whole checkpoint", f"correct {bases_file()}")
    folder = folder_of_parts(entry)
    assert folder is not None
    found = read_architecture(folder)
    if found.process != "flow":
        got = f"parts = {entry.parts!r} for the file {path}, a base with a U-Net"
        raise ImagicError(
            got, "a base with a flow transformer", "remove parts: a whole checkpoint has its parts, and config names its configs"
        )
    check_transformer(path, found, read_header(path)[0])
    return with_entry(found, entry)


def with_entry(architecture: Architecture, entry: BaseEntry | None) -> Architecture:
    """The architecture with the prediction type, resolution and number of sampling steps of a base's entry, where it sets them.

    Raises:
        ImagicError: the entry states what the architecture cannot have.
    """
    if entry is None:
        return architecture
    scheduler, is_flow = dict(architecture.scheduler), architecture.process == "flow"
    if entry.prediction and (entry.prediction == "flow") != is_flow:
        got = f"prediction {entry.prediction} for the base {entry.source}, {'a flow transformer' if is_flow else 'a U-Net'}"
        raise ImagicError(got, "flow" if is_flow else "epsilon, v_prediction or sample", f"correct {bases_file()}")
    if entry.prediction and not is_flow:
        scheduler["prediction_type"] = entry.prediction
    if entry.few_steps and not is_flow and scheduler["_class_name"] not in _CONSISTENCY_SCHEDULERS:
        scheduler["timestep_spacing"] = "trailing"  # distilled bases sample from the last timestep, which is pure noise
    sized = architecture.with_resolution(entry.resolution) if entry.resolution else architecture
    return replace(sized, scheduler=scheduler, few_steps=entry.few_steps or architecture.few_steps)


def recipe_for(architecture: Architecture, base: str, revision: str | None = None) -> Recipe:
    """The recipe of a base: its own, or that of its kind, with the sampling of a distilled base.

    Args:
        architecture: configs of the base.
        base: name, folder, file or hub id of the base.
        revision: revision of a hub id.
    """
    return recipe_of(known_base(base, revision).built_in, architecture.few_steps, architecture.guidance, architecture.recipe)


def folder_of_parts(entry: BaseEntry | None) -> Path | None:
    """The folder of the components that the folder of a base lacks; None if its entry names none.

    Raises:
        ImagicError: what the entry names is no local folder in diffusers' format.
    """
    if entry is None or entry.parts is None:
        return None
    known = known_base(entry.parts)
    folder = local_path(known.source) or _in_hub_cache(known)
    if folder is None or not (folder / "model_index.json").is_file():
        got = f"parts = {entry.parts!r} for the base {entry.source}"
        expected = "a folder in diffusers' format, or the name of a base that is one or is downloaded"
        raise ImagicError(got, expected, f"correct {bases_file()}, or download {known.source} (hf download {known.source})")
    return folder


def _in_hub_cache(known: KnownBase) -> Path | None:
    """The folder of a hub id that was downloaded; None if it was not."""
    from huggingface_hub import try_to_load_from_cache  # slow to import

    try:
        found = try_to_load_from_cache(known.source, "model_index.json", revision=known.entry.revision if known.entry else None)
    except ValueError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def component_folder(folder: Path, part: str, others: Path | None) -> Path:
    """The folder of a component: of a base's own folder, or of the one with the components that it lacks."""
    return folder / part if others is None or (folder / part).is_dir() else others / part


def read_architecture(folder: Path, others: Path | None = None) -> Architecture:
    """The architecture of a folder in diffusers' format.

    Args:
        folder: folder of the base.
        others: folder with the components that it lacks.

    Raises:
        ImagicError: a config is missing or cannot be read; the configs do not describe a Stable Diffusion base.
    """
    index = read_index(folder)
    if index["_class_name"] in FLOW_FAMILIES:
        return (_read_klein if index["_class_name"] == "Flux2KleinPipeline" else _read_sd3)(folder, index, others)
    encoders = [name for name in UNetArchitecture.encoder_classes if name in index]
    parts = _read_parts(folder, index, "unet", encoders, _DEFAULTS, others)
    check_sizes(folder, parts)
    parts["unet"] = _corrected(parts["unet"], index["_class_name"] in _CORRECTING_SIZES)
    clips = parts["scheduler"].get("clip_sample", index["scheduler"][1] in _CLIPPING)
    if clips and index["_class_name"] not in _CORRECTING and "text_encoder_2" not in index:
        raise unusable_base(f"{folder} has a {index['_class_name']} with clip_sample", "clip_sample = false")
    empty_is_zeros = index.get("force_zeros_for_empty_prompt", True) is True and "text_encoder_2" in index
    steps = _CONSISTENCY_STEPS if index["scheduler"][1] in _CONSISTENCY_SCHEDULERS else None
    texts = {name: parts[name] for name in encoders}
    return UNetArchitecture(parts["unet"], parts["vae"], texts, parts["scheduler"], empty_is_zeros, steps)


def _read_sd3(folder: Path, index: dict[str, Any], others: Path | None) -> SD3Architecture:
    """The architecture of a folder of Stable Diffusion 3, which may lack T5, or have one CLIP text encoder alone."""
    kind = SD3ClipArchitecture if index["text_encoder"][1] == "CLIPTextModel" else SD3Architecture
    encoders = [name for name in kind.encoder_classes if index.get(name) not in (None, [None, None])]
    parts = _read_parts(folder, index, "transformer", encoders, _SD3_DEFAULTS, others)
    check_sd3_sizes(folder, parts)
    texts = {name: parts[name] for name in encoders}
    return kind(_public(parts["transformer"]), parts["vae"], texts, parts["scheduler"])


def _read_klein(folder: Path, index: dict[str, Any], others: Path | None) -> KleinArchitecture:
    """The architecture of a folder of FLUX.2 klein; that of its text encoder has only the layers that are read."""
    parts = _read_parts(folder, index, "transformer", ["text_encoder"], {}, others)
    check_klein_sizes(folder, parts)
    text = {name: value for name, value in parts["text_encoder"].items() if name not in ("rope_theta", "layer_types")}
    text |= {"num_hidden_layers": KLEIN_LAYERS[-1]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta(folder, parts["text_encoder"])}
    steps = _KLEIN_STEPS if index.get("is_distilled") else None
    transformer, vae = _public(parts["transformer"]), parts["vae"]
    return KleinArchitecture(transformer, vae, {"text_encoder": text}, parts["scheduler"], few_steps=steps)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A config without diffusers' notes on itself."""
    return {name: value for name, value in config.items() if name != "_diffusers_version"}


def _read_parts(
    folder: Path,
    index: dict[str, Any],
    denoiser: str,
    encoders: Sequence[str],
    defaults: Mapping[str, dict[str, Any]],
    others: Path | None,
) -> dict[str, dict[str, Any]]:
    """The checked configs of a folder by component, with the defaults of their classes where these are needed.

    Args:
        folder: folder of the base.
        index: content of its ``model_index.json``.
        denoiser: component name of the denoiser.
        encoders: component names of the text encoders.
        defaults: those of the classes, by component, where a config may leave them out.
        others: folder with the components that the folder lacks.
    """
    keys: Mapping[str, Keys] = keys_of(index)
    files = {denoiser: "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"} | dict.fromkeys(encoders, "config.json")
    parts: dict[str, dict[str, Any]] = {}
    for part, file in files.items():
        path, kind = component_folder(folder, part, others) / file, part.removesuffix("_2")
        config = read_json(path)
        check_keys(path, keys[kind], config)
        # transformers would read more of a text encoder's config: names of code and files to load
        heard = {name: config[name] for name in config if name in keys[kind].honoured} if part in encoders else config
        parts[part] = defaults.get(part, {}) | heard
    parts["scheduler"]["_class_name"] = index["scheduler"][1]
    return parts


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
    published = {name: one for name, one in PUBLISHED.items() if isinstance(one, UNetArchitecture)}
    if config not in published and not (folder and folder.is_dir()):
        raise ImagicError(
            f"config {config!r} of {path}", f"one of {', '.join(published)}, or a folder in diffusers' format", f"correct {bases_file()}"
        )
    given = published.get(config) or read_architecture(folder or path)
    if not isinstance(given, UNetArchitecture):
        got = f"config {config!r} of {path}, of a flow"
        raise ImagicError(got, "a config of Stable Diffusion 1, 2 or XL for a single file", "use a folder in diffusers' format")
    return given
