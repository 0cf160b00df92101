"""The architecture of a checkpoint in the original layout. This module does not import torch."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....core.errors import ImagicError
from ...architecture import Architecture
from ..known import BaseEntry, bases_file
from ..published import PUBLISHED
from ..sizes import check_sizes
from ..vetting import ZERO_SNR_SCHEDULERS, inpainting_channels, read_header
from .detection import Header, check_other_models, check_unet, detected_family, first_layer
from .statements import agreed, statements

_SD2_SMALL = 512  # resolution in pixels of the models of Stable Diffusion 2 that predict the noise


def single_architecture(path: Path, entry: BaseEntry | None, given: Architecture | None = None) -> Architecture:
    """The architecture of a single file in the original layout, which contains no configs.

    What the file declares about itself (see ``statements.py``) overrides the configs; what the entry states overrides both.

    Args:
        path: the file.
        entry: entry of a named base.
        given: the architecture that the entry names. None: the published one of the family, which is detected from the tensor names.

    Raises:
        ImagicError: the file is a pickle or no such checkpoint; it belongs to Stable Diffusion 2 and neither the file nor the entry states
            the prediction type; the file contradicts itself.
    """
    tensors, metadata = read_header(path)
    stated: dict[str, Any] = {"prediction_type": entry.prediction, "resolution": entry.resolution} if entry else {}
    declared: dict[str, Any] = agreed(path, statements(path, tensors, metadata), [name for name, value in stated.items() if value])
    if given:
        check_other_models(path, tensors)
        return _with_statements(path, _with_inputs(given, tensors), declared)
    family = detected_family(path, tensors)
    name = str(declared.get("published", family)) if family == "sdxl" else family
    published = _with_inputs(PUBLISHED[name], tensors)
    prediction = declared.get("prediction_type") or stated.get("prediction_type")
    if family == "sd21" and prediction is None and published.inpaints:
        prediction = declared["prediction_type"] = "epsilon"  # as in diffusers and ComfyUI: there is no other one
    if family == "sd21" and prediction is None:
        raise ImagicError(
            f"{path} does not state its prediction type, and Stable Diffusion 2 exists with both", "epsilon or v_prediction",
            f"add the file to {bases_file()}, with its prediction: see docs/guide/bases.md",
        )  # fmt: skip
    if family == "sd21" and prediction == "epsilon":
        declared = {"resolution": _SD2_SMALL} | declared
    check_unet(path, name, published, tensors)
    return _with_statements(path, published, declared)


def _with_inputs(architecture: Architecture, tensors: Header) -> Architecture:
    """The architecture with the input channels of an inpainting model, if the first layer of the file has them."""
    channels = inpainting_channels(architecture.latent_channels)
    if first_layer(tensors)[1:2] != [channels]:
        return architecture
    return replace(architecture, denoiser=architecture.denoiser | {"in_channels": channels})


def _with_statements(path: Path, architecture: Architecture, declared: Mapping[str, Any]) -> Architecture:
    """The architecture with the settings that a file states.

    Raises:
        ImagicError: the number of attention heads differs; a number is implausible; an inpainting model is declared and is none.
    """
    declared = dict(declared)
    if declared.pop("inpaints", False) and not architecture.inpaints:
        got = f"the config beside {path} has conditioning_key = 'hybrid', and the file is no inpainting model"
        raise ImagicError(got, "crossattn, or a U-Net with the inputs of an inpainting model", "correct or remove the config")
    declared.pop("published", None)
    unet, vae, scheduler = dict(architecture.denoiser), dict(architecture.vae), dict(architecture.scheduler)
    levels = len(unet["block_out_channels"])
    own = unet.get("attention_head_dim", 8)
    heads = own if isinstance(own, list) else [own] * levels
    if (stated := declared.pop("attention_head_dim", heads)) != heads:
        got = f"the config beside {path} has {reprlib.repr(stated)} attention heads"
        raise ImagicError(got, f"{heads}", f"add the file to {bases_file()} with a matching config: see docs/guide/bases.md")
    if side := declared.pop("resolution", None):
        unet["sample_size"] = side // architecture.vae_scale_factor
    if factor := declared.pop("scaling_factor", None):
        vae["scaling_factor"] = factor
    if declared.pop("zero_snr", False):
        # sampling begins at the last timestep, which has no signal; a sampler that cannot do that is replaced
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if scheduler["_class_name"] not in ZERO_SNR_SCHEDULERS:
            scheduler["_class_name"] = "DDIMScheduler"
    scheduler |= declared
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler} | architecture.text_encoders
    check_sizes(path, parts)
    return replace(architecture, denoiser=unet, vae=vae, scheduler=scheduler)
