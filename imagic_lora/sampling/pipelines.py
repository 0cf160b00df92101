"""Prepares and calls diffusers pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig


def pipeline_guidance(base: Base, config: EditConfig, guided: bool) -> float:
    """Returns the guidance scale for a pipeline call; 1 turns guidance off, unless the denoiser takes the scale as an input."""
    return config.guidance_scale if guided or base.architecture.embeds_guidance else 1.0


def conditioning_kwargs(base: Base, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
    """Returns the pipeline kwargs of a conditioning and of the unconditional one (None without guidance), on device in the base's dtype."""
    device, dtype = base.runtime.device, base.runtime.dtype
    return base.pipeline_kwargs(conditioning.to(device, dtype), None if null is None else null.to(device, dtype))


def sample_latents(base: Base, pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """Calls a pipeline and returns its latents before decoding, ``[B, C, h, w]``."""
    device, dtype = base.runtime.device, base.runtime.dtype
    mixed_precision = base.denoiser.dtype != dtype
    with torch.autocast(device.type, dtype, enabled=mixed_precision, cache_enabled=False):
        return pipe(**arguments, output_type="latent").images
