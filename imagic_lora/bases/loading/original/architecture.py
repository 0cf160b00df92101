"""The architecture of a checkpoint in the original layout. This module does not import torch."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....core.errors import ImagicError
from ...architecture import Architecture
from ..known import BaseEntry, bases_file
from ..published import PUBLISHED
from ..vetting import read_header, unusable_base

_FAMILY_TENSORS = {  # by name of a tensor that only checkpoints of this family have
    "conditioner.embedders.1.model.ln_final.weight": "sdxl",
    "cond_stage_model.model.ln_final.weight": "sd21",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "sd15",
}


def single_architecture(path: Path, entry: BaseEntry | None, given: Architecture | None = None) -> Architecture:
    """The architecture of a single file in the original layout, which contains no configs.

    The prediction type is read from a tensor ``v_pred`` or from ``modelspec.prediction_type`` in the metadata. A tensor ``ztsnr`` means a
    noise schedule with zero terminal signal-to-noise ratio (arXiv 2305.08891).

    Args:
        path: the file.
        entry: entry of a named base.
        given: the architecture that the entry names. None: the published one of the family, which is detected from the tensor names.

    Raises:
        ImagicError: the file is a pickle or no such checkpoint; it belongs to Stable Diffusion 2 and neither the file nor the entry states
            the prediction type.
    """
    tensors, metadata = read_header(path)
    if given:
        family, architecture = None, given
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
