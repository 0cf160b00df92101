"""The exact plan: both stages, sampling and decoding run on tensors without values, and are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from transformers import CLIPTextConfig

from ..adapters.full import unfrozen
from ..adapters.lora import attached
from ..bases.architecture import Architecture
from ..bases.families.sd import TOKENIZERS, StableDiffusion, vae_dtype
from ..bases.loading.components import TEXT_ENCODERS
from ..bases.loading.registry import family_of
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.runtime import DTYPES, Processes, Runtime
from ..memory.plan import Assumed, Peak, Plan, comes_later, passes, with_stages
from ..memory.tracker import Tracker
from .embed import embed_stage
from .stage import Stage
from .tune import tune_stage


def _normalising_in_fp32(normalise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What autocast does to a normalisation on a card, and not on the CPU."""

    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(one.float() if isinstance(one, Tensor) else one for one in args)
        return normalise(*args, **kwargs)

    return wide


@contextmanager
def _autocast_as_on_a_card() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(F, name, _normalising_in_fp32(getattr(F, name))))
        yield


def rehearse(architecture: Architecture, run: RunConfig, assumed: Assumed) -> Plan:
    """The plan that :func:`imagic_lora.memory.plan.predict` estimates, from a count of every tensor.

    The real code runs, on fake tensors of the true sizes: nothing is computed and next to nothing held. bitsandbytes is stood in for by
    modules of the same size, kernels' own workspace is not counted.

    Args:
        assumed: device, precision and optimiser to rehearse for.
    """
    idle = "keep" if run.memory.idle == "keep" else "release"  # on the one device there is here, offloading would move nothing
    memory = run.memory.model_copy(update={"idle": idle, "attention": "sdpa"})
    runtime = Runtime(torch.device("cpu"), DTYPES[assumed.dtype], assumed.optimizer, memory, {})
    with FakeTensorMode(), patch.object(Module, "_apply", _converted), Tracker() as tracker:
        base = random_base(architecture, run, runtime)
        with _autocast_as_on_a_card() if assumed.device == "cuda" else nullcontext():
            stages = dict(_stages(base, run, tracker))
    if comes_later(run, assumed):
        later = sum(one.nbytes for one in (*base.denoiser.parameters(), *base.denoiser.buffers()))
        stages["encode"] = replace(stages["encode"], weights=stages["encode"].weights - later)
    return with_stages(architecture, run, assumed, stages)


def _converted(module: Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
    """``Module._apply``, whose own way with fake tensors (swapping them) fails as soon as something refers to one weakly."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, one in module._parameters.items():
            module._parameters[name] = None if one is None else Parameter(change(one), one.requires_grad)
        for name, one in module._buffers.items():
            module._buffers[name] = None if one is None else change(one)
    return module


def random_base(architecture: Architecture, run: RunConfig, runtime: Runtime) -> StableDiffusion:
    """A base of true size with random weights and no tokenizer: neither memory nor speed depends on their values."""
    full = run.tune.mode == "full" and run.memory.master_weights == "fp32"

    def helper(name: str) -> Any:
        with _default_dtype(vae_dtype(architecture, runtime.dtype) if name == "vae" else runtime.dtype):
            if name == "vae":
                return AutoencoderKL.from_config(architecture.vae)
            return TEXT_ENCODERS[name](CLIPTextConfig(**architecture.text_encoders[name]))

    with _default_dtype(torch.float32 if full else runtime.dtype):
        unet = UNet2DConditionModel.from_config(architecture.unet)
    parts = {"unet": unet, "scheduler": DDIMScheduler.from_config(architecture.scheduler), "vae": helper("vae")}
    for encoder in architecture.text_encoders:
        parts |= {encoder: helper(encoder), TOKENIZERS[encoder]: None}
    return family_of(architecture)(architecture, parts, run.base, None, "", runtime, helper)


def random_text(base: StableDiffusion, height: int, width: int) -> Conditioning:
    """A conditioning of the right shapes for a picture of that size, without a tokenizer."""
    named = {name: torch.rand(shape) for name, shape in base.architecture.conditioning.items()}
    return base.with_added_conditions(Conditioning.from_tensors(named), height, width, 1.0).to(base.runtime.device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _stages(base: StableDiffusion, run: RunConfig, tracker: Tracker) -> Iterator[tuple[str, Peak]]:
    side = run.resolution or base.resolution
    tracker.reset_peak()
    held = tracker.now
    latents = base.encode_image(torch.empty(1, 3, side, side))
    yield "encode", Peak(held, 0, 0, tracker.peak - held)
    base.offload_encoders()
    text = random_text(base, side, side)
    stage = embed_stage(base, latents, text, _short(run.embed), 0, Processes())
    yield "embed", _trained(stage, tracker)
    del stage
    with attached(base, run.tune, 0) if run.tune.mode == "lora" else unfrozen(base, restore=False) as trainables:
        stage = tune_stage(base, latents, text, trainables, _short(run.tune), 0, Processes())
        yield "tune", _trained(stage, tracker)
        del stage
        yield from _pictures(base, run, latents, text, tracker)


def _short(config: Any) -> Any:
    return config.model_copy(update={"steps": 2})


def _trained(stage: Stage, tracker: Tracker) -> Peak:
    """The second step is the one that counts: the optimiser's states are there by then."""
    weights = tracker.now
    stage.step(0)
    states = tracker.now - weights
    tracker.reset_peak()
    stage.step(1)
    inside = stage.base.runtime.memory.optimizer_in_backward
    gradients = 0 if inside else sum(p.numel() * p.element_size() for p in stage.trainables.values())
    return Peak(weights, gradients, states, tracker.peak - weights - gradients - states)


@torch.no_grad()
def _pictures(base: StableDiffusion, run: RunConfig, latents: Tensor, text: Conditioning, tracker: Tracker) -> Iterator[tuple[str, Peak]]:
    base.pipeline("text2image")  # wakes the VAE, as an edit does
    held, count = tracker.now, run.edit.batch_size
    tracker.reset_peak()
    batch = count * passes(base.architecture, run)
    noisy, times = latents.expand(batch, -1, -1, -1).to(base.denoiser.dtype), torch.zeros(batch, dtype=torch.int64)
    dtype = base.runtime.dtype
    with torch.autocast("cpu", dtype, enabled=base.denoiser.dtype != dtype, cache_enabled=False):  # as generate() has it
        told = text.expand(batch).to(noisy.device, dtype)
        base.denoiser(noisy, times, told.tokens, **base.added_conditions(told))
        del told
    yield "sample", Peak(held, 0, 0, tracker.peak - held)
    tracker.reset_peak()
    base.decode(latents.expand(count, -1, -1, -1))
    yield "decode", Peak(held, 0, 0, tracker.peak - held)
