"""Calls of diffusers' pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig


def pipeline_guidance(base: Base, config: EditConfig, guided: bool) -> float:
    """The guidance scale that a pipeline is told: an input of some denoisers, else 1 for none."""
    return config.guidance_scale if guided or base.architecture.embeds_guidance else 1.0


def pipeline_with_scheduler(base: Base, sampler: Any) -> Any:
    """The text-to-image pipeline with another sampler than the base declares, on the same schedule."""
    pipe: Any = base.pipeline("text2image")
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    return pipe


def conditioning_kwargs(base: Base, text: Conditioning, null: Conditioning | None) -> dict[str, Any]:
    device, dtype = base.runtime.device, base.runtime.dtype
    return base.pipeline_kwargs(text.to(device, dtype), None if null is None else null.to(device, dtype))


def sample_latents(base: Base, pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """What a pipeline comes to, before it is decoded."""
    device, dtype = base.runtime.device, base.runtime.dtype
    mixed = base.denoiser.dtype != dtype
    with torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False):
        return pipe(**arguments, output_type="latent").images
