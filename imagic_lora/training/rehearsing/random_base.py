"""Bases of true size with random weights and no vocabulary, for measuring memory and speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import _disable_current_modes
from transformers import BatchEncoding

from ...adapters.modes import MODES
from ...bases.architecture import Architecture
from ...bases.families.common import LatentBase
from ...bases.loading.components import TEXT_ENCODERS, tokenizer_of, vae_dtype
from ...bases.loading.registry import family_of
from ...core.conditioning import Conditioning
from ...core.config import RunConfig
from ...core.runtime import Runtime


def random_base(architecture: Architecture, run: RunConfig, runtime: Runtime) -> LatentBase:
    """A base of true size with random weights and no vocabulary, for measuring memory and speed.

    Args:
        architecture: configs of the base's components.
        run: settings of the run.
        runtime: device and precision of the base.
    """
    family = family_of(architecture)
    fp32_weights = MODES[run.tune.mode].in_base and run.memory.master_weights == "fp32"

    def load(name: str) -> Any:
        with _default_dtype(vae_dtype(architecture, runtime.dtype) if name == "vae" else runtime.dtype):
            if name == "vae":
                return family.vae_class.from_config(architecture.vae)
            config_class, model_class = TEXT_ENCODERS[architecture.encoder_classes[name]]
            return model_class(config_class(**architecture.text_encoders[name]))

    with _default_dtype(torch.float32 if fp32_weights else runtime.dtype):
        denoiser = family.denoiser_class.from_config(architecture.denoiser)
    if architecture.process == "flow":
        with _disable_current_modes():  # its constructor reads the value of a tensor, and fake tensors have none
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(architecture.scheduler)
    else:
        scheduler = DDIMScheduler.from_config(architecture.scheduler)
    components = {architecture.component: denoiser, "scheduler": scheduler, "vae": load("vae")}
    for encoder in architecture.text_encoders:
        components |= {
            encoder: load(encoder),
            tokenizer_of(encoder): _Padding(architecture.vectors[encoder][1]),
        }
    return family(architecture, components, run.base, None, "", runtime, load)


@dataclass
class _Padding:
    """In place of a tokenizer: every prompt is padding alone, so no vocabulary is needed."""

    model_max_length: int
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, prompt: str, **_: Any) -> BatchEncoding:
        ids = torch.zeros(1, self.model_max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.zeros_like(ids)})


def random_conditioning(base: LatentBase, height: int, width: int) -> Conditioning:
    """A random conditioning with the shapes of a base, added conditions included.

    Args:
        base: may have no vocabulary.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    tensors = {name: torch.rand(shape) for name, shape in base.architecture.conditioning.items()}
    return base.with_added_conditions(Conditioning.from_tensors(tensors), height, width, 1.0).to(base.runtime.device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
