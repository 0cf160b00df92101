"""Prepares and calls diffusers pipelines."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..bases.base import Base, PipelineKind
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..core.errors import ImagicError


def pipeline_guidance(base: Base, config: EditConfig, guided: bool) -> float:
    """Returns the guidance scale for a pipeline call; 1 turns guidance off, unless the denoiser takes the scale as an input."""
    return config.guidance_scale if guided or base.architecture.guidance == "embedded" else 1.0


def negative(base: Base, config: EditConfig, null: Conditioning | None) -> Conditioning | None:
    """Returns what classifier-free guidance leads away from: the encoded negative prompt, or ``null`` if there is none.

    Call it before the text encoders are offloaded.

    Args:
        base: encodes the negative prompt.
        config: settings of the sampling. With a guidance scale of 1 or less the negative prompt has no effect.
        null: unconditional conditioning with added conditions; None for a base whose denoiser takes the guidance scale as an input.

    Raises:
        ImagicError: there is a negative prompt, and the base has no unconditional pass.
    """
    if not config.negative_prompt or config.guidance_scale <= 1:
        return null
    if null is None:
        got = f"a negative prompt with {base.name}, whose denoiser takes the guidance scale as an input"
        raise ImagicError(got, "a base with classifier-free guidance", "leave out the negative prompt")
    return replace(base.encode_prompt(config.negative_prompt), extra=null.extra)


def sampling_pipeline(base: Base, config: EditConfig, kind: PipelineKind) -> Any:
    """Returns a pipeline with the scheduler of the settings."""
    pipe: Any = base.pipeline(kind)
    if config.scheduler != "base" or config.karras_sigmas:
        pipe.scheduler = base.sampler(config.scheduler, config.karras_sigmas)
    return pipe


def rescale_kwargs(pipe: Any, config: EditConfig, guided: bool) -> dict[str, Any]:
    """Returns the pipeline kwargs of ``guidance_rescale``.

    Raises:
        ImagicError: diffusers' pipeline has no such argument, or guides without a second pass.
    """
    if not config.guidance_rescale or config.guidance_scale <= 1:
        return {}
    if not guided or "guidance_rescale" not in inspect.signature(pipe.__call__).parameters:
        got = f"guidance_rescale {config.guidance_rescale:g} with start {config.start}, for which diffusers uses {type(pipe).__name__}"
        raise ImagicError(got, "classifier-free guidance by a pipeline with guidance_rescale", "use --guidance-rescale 0")
    return {"guidance_rescale": config.guidance_rescale}


def check_ddim_eta(scheduler: Any, config: EditConfig) -> None:
    """Raises ImagicError if there is a ``ddim_eta`` and the steps of the scheduler take none."""
    if config.ddim_eta and "eta" not in inspect.signature(scheduler.step).parameters:
        got = f"ddim_eta {config.ddim_eta:g} with scheduler {type(scheduler).__name__}"
        raise ImagicError(got, "a scheduler with an eta parameter, such as DDIMScheduler", "set ddim_eta to 0")


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
