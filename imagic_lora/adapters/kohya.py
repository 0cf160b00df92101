"""LoRA layers and their metadata in the format of kohya's scripts, and which family an adapter is of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ImagicError
from ..core.tensors import read
from .adapter import Adapter
from .contents import canvas_size, read_embeddings
from .lora import LORA_FILE
from .original_names import original_names
from .record import REMEDY

_OPENCLIP_WIDTH = 1024  # of the embeddings of Stable Diffusion 2
Version = Literal["v1", "v2", "xl", "sd3", "flux2-klein"]
_STABILITY = "https://github.com/Stability-AI/generative-models"


def kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the LoRA layers under the names of kohya's scripts: ``lora_unet_`` and the name of the layer, with underscores for dots.

    Those scripts use the layer names of diffusers for Stable Diffusion 1 and 2, and the layer names of Stability's own code for SDXL.
    The prefix of a transformer is ``lora_transformer_``: ComfyUI reads it with the layer names of diffusers.
    Readers multiply by ``alpha / rank``, and some assume that alpha is the rank. Therefore the scale is multiplied into the second matrix
    and alpha is set to the rank.

    Raises:
        ImagicError: the file holds anything other than LoRA layers of the recorded rank.
    """
    path, tune = adapter.listed(LORA_FILE), adapter.record.config.tune
    stored, scale, part = read(path), 1.0 if tune.alpha is None else tune.alpha / tune.rank, component(adapter)
    layers = sorted({name.removeprefix(f"{part}.").rpartition(".lora_")[0] for name in stored})
    names = original_names(layers) if version(adapter) == "xl" else {layer: layer for layer in layers}
    tensors: dict[str, Tensor] = {}
    for layer, name in names.items():
        down, up = (stored.pop(f"{part}.{layer}.lora_{matrix}.weight", None) for matrix in "AB")
        if down is None or up is None or down.shape[:1] != (tune.rank,) or up.shape[1:2] != (tune.rank,):
            raise ImagicError(
                f"{path} holds no pair of matrices of rank {tune.rank} for {layer[:80]!r}", "a LoRA file written by fit", REMEDY
            )
        key = f"lora_{part}_{name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ImagicError(f"{path} holds two layers that are {key} in this format", "a LoRA file written by fit", REMEDY)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale, f"{key}.alpha": torch.tensor(float(tune.rank))}
    if stored:
        raise ImagicError(f"{path} holds the unexpected tensor {next(iter(stored))[:80]!r}", "LoRA layers only", REMEDY)
    return tensors


def component(adapter: Adapter) -> str:
    """The denoiser's component name; ``unet`` for an adapter without weights."""
    return next((part.component for part in adapter.record.parts), "unet")


def version(adapter: Adapter) -> Version:
    """Derives the version of Stable Diffusion, or FLUX.2 klein, from the denoiser and the shapes of the embeddings."""
    target = read_embeddings(adapter)["target"]
    if component(adapter) == "transformer":
        return "flux2-klein" if target.pooled is None else "sd3"
    if target.pooled is not None:
        return "xl"
    return "v2" if target.tokens.shape[-1] == _OPENCLIP_WIDTH else "v1"


def metadata(adapter: Adapter) -> dict[str, str]:
    """Returns the metadata of the file: Stability's model specification, and the settings under the names of kohya's scripts."""
    record, tune, kind = adapter.record, adapter.record.config.tune, version(adapter)
    width, height = canvas_size(adapter)
    second = "v2-768-v" if height * width > 512 * 512 else "v2-512"  # a guess: the record does not contain the prediction type of the base
    versions = {"v1": "v1", "v2": second, "xl": "xl-v1-base", "sd3": "3"}
    architecture = f"stable-diffusion-{versions[kind]}" if kind in versions else "flux-2-klein"
    names = {"v1": "sd_v1", "v2": "sd_v2", "xl": "sdxl_base_v1-0", "sd3": "sd3", "flux2-klein": "flux2_klein"}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": _STABILITY if kind == "xl" else "diffusers",
        "modelspec.title": adapter.name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.description": record.prompt,
        "modelspec.date": record.created,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(tune.rank),
        "ss_network_alpha": str(float(tune.rank)),
        "ss_base_model_version": names[kind],
        "ss_v2": str(kind == "v2"),
        "ss_sd_model_name": record.base.name,
        "ss_output_name": adapter.name,
        "ss_num_train_images": str(1 + len(record.source.others)),
        "ss_resolution": f"({width}, {height})",
        "ss_steps": str(tune.steps),
        "ss_learning_rate": str(tune.learning_rate),
        "ss_seed": str(record.config.seed),
    }
