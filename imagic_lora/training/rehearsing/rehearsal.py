"""The exact memory plan: training, sampling and decoding run on fake tensors, and every tensor is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, astuple, replace
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Linear, Module

from ...adapters.batched import batched
from ...adapters.modes import MODES
from ...bases.architecture import LARGE_ENCODERS, Architecture, UNetArchitecture
from ...bases.families.common import LatentBase
from ...core.config import RunConfig
from ...core.runtime import DTYPES, Processes, Runtime
from ...memory.optimizer_states import state_bytes
from ...memory.plan import Assumed, Peak, Plan, denoiser_waits_in_host_memory
from ...memory.prediction import plan_from_peaks
from ...memory.rehearsed import Rehearsed, remember
from ...memory.tracker import Tracker
from ...memory.trained import CountedWeights
from ..embed import embed_stage
from ..prior import Prior, PriorStage
from ..tune import tune_stage
from .fake_tensors import convert, cuda_autocast
from .peaks import sampling_peaks, training_peak, two_steps
from .random_base import random_base, random_conditioning


def rehearse(architecture: Architecture, run: RunConfig, assumed: Assumed, photos: int = 1) -> Plan:
    """The plan that :func:`imagic_lora.memory.prediction.predict` estimates, from a count of every tensor.

    The real code runs on fake tensors of the true sizes: nothing is computed, and their memory is not allocated. Modules of the same size
    replace those of bitsandbytes. Workspace inside kernels is not counted. What is counted for a flow is kept for later
    (:mod:`imagic_lora.memory.rehearsed`).

    Args:
        architecture: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer of the plan.
        photos: number of photos that are fitted together.

    Raises:
        NotPlanned: as :func:`imagic_lora.memory.prediction.predict`.
    """
    # all fake tensors are on the CPU, where offloading would move nothing; releasing removes the same bytes from the device
    idle = "keep" if run.memory.idle == "keep" else "release"
    memory = run.memory.model_copy(update={"idle": idle, "attention": "sdpa"})
    runtime = Runtime(torch.device("cpu"), DTYPES[assumed.dtype], assumed.optimizer, memory, {})
    with FakeTensorMode(), patch.object(Module, "_apply", convert), Tracker() as tracker:
        base = random_base(architecture, run, runtime)
        base.load_encoders()
        helpers = dict(zip(("vae", *architecture.text_encoders), base.helper_bytes(), strict=True))
        counts = None if isinstance(architecture, UNetArchitecture) else counted(base, run)
        with cuda_autocast() if assumed.device == "cuda" else nullcontext():
            stages = dict(_stages(base, run, tracker, photos))
    if assumed.device == "cuda" and idle == "release" and architecture.has_large_encoder:
        stages["encode"] = _photo_or_prompt(architecture, run, helpers, stages["encode"])
    if denoiser_waits_in_host_memory(run, assumed):
        denoiser = sum(tensor.nbytes for tensor in (*base.denoiser.parameters(), *base.denoiser.buffers()))
        stages["encode"] = replace(stages["encode"], weights=stages["encode"].weights - denoiser)
    if counts is not None:
        rehearsed = Rehearsed({name: list(astuple(peak)) for name, peak in stages.items()}, asdict(counts))
        remember(architecture, run, asdict(assumed), rehearsed)
    return plan_from_peaks(architecture, run, assumed, stages, counts)


def _photo_or_prompt(architecture: Architecture, run: RunConfig, helpers: dict[str, int], photo: Peak) -> Peak:
    """The peak of stage encode where a large text encoder is alone on the card, see ``LatentBase._make_room``: of the photo or the prompt.

    A large text encoder holds the outputs of all layers, four tensors of the inner width of one, and a 4-bit matrix in half precision.

    Args:
        architecture, run: as in :func:`rehearse`.
        helpers: bytes of VAE and text encoders, by name.
        photo: the peak with all of them on the card, while the photo is encoded.
    """
    rest = photo.weights - sum(helpers.values())
    peaks = []
    for name, config in architecture.text_encoders.items():
        if architecture.encoder_classes[name] in LARGE_ENCODERS:
            _, length, width = architecture.vectors[name]
            inner: int = config["intermediate_size" if "intermediate_size" in config else "d_ff"]
            layers: int = config["num_hidden_layers" if "num_hidden_layers" in config else "num_layers"]
            held = length * ((layers + 1) * width + 4 * inner)
            matrix = inner * width if run.memory.quantize_text != "none" else 0
            peaks.append(Peak(rest + helpers[name], 0, 0, 2 * (held + matrix)))
    small = sum(size for name, size in helpers.items() if architecture.encoder_classes.get(name) not in LARGE_ENCODERS)
    return max(replace(photo, weights=rest + small), *peaks, key=lambda peak: peak.total)


def counted(base: LatentBase, run: RunConfig) -> CountedWeights:
    """Counts the weights of a denoiser, and those of the LoRA layers that a run would add to it."""
    tensors = [*base.denoiser.parameters(), *base.denoiser.buffers()]
    shapes = [tuple(parameter.shape) for parameter in base.denoiser.parameters()]
    lora: list[tuple[int, int]] = []
    if run.tune.mode == "lora":
        targets, rank = tuple(f".{suffix}" for suffix in base.lora_targets(run.tune.targets)), run.tune.rank
        for name, module in base.denoiser.named_modules():
            layer: Any = module
            if not f".{name}".endswith(targets):
                continue
            inputs, outputs = (
                (layer.in_features, layer.out_features) if isinstance(layer, Linear) else (layer.in_channels, layer.out_channels)
            )
            kernel = 1 if isinstance(layer, Linear) else prod(layer.kernel_size)
            lora += [(rank, inputs * kernel), (outputs, rank)]
    optimizer = base.runtime.optimizer
    return CountedWeights(
        sum(map(prod, shapes)),
        sum(tensor.nbytes for tensor in tensors),
        sum(state_bytes(optimizer, *shape) for shape in shapes),
        sum(map(prod, lora)),
        sum(state_bytes(optimizer, *shape) for shape in lora),
    )


def _stages(base: LatentBase, run: RunConfig, tracker: Tracker, photos: int) -> Iterator[tuple[str, Peak]]:
    """Runs every stage, and yields its name and its peak."""
    side = run.resolution or base.resolution
    tracker.reset_peak()
    held = tracker.now
    latents = base.encode_image(torch.empty(1, 3, side, side))
    yield "encode", Peak(held, 0, 0, tracker.peak - held)
    conditioning = random_conditioning(base, side, side)
    if run.prior:
        base.offload_encoders()
        held, activations = sampling_peaks(base, run, latents, conditioning, tracker)
        yield "class", Peak(held, 0, 0, max(activations.values()))
        base.offload_encoders()
    if run.encodes_while_training:  # the vectors of a whole prompt also stand for those of a new word
        conditioning = replace(conditioning, vectors=base.encode_vectors("").vectors)
    else:
        base.offload_encoders()
    if "embed" in run.stages:
        stages = [embed_stage(base, latents, conditioning, two_steps(run.embed), 0, Processes()) for _ in range(photos)]
        yield "embed", training_peak(stages, run, tracker)
        del stages
    base.offload_encoders()
    conditioning = replace(conditioning, vectors={})
    with ExitStack() as stack:
        if photos > 1 and "tune" in run.stages:
            lora = stack.enter_context(batched(base, run.tune, range(photos)))
            trainables, lora.rows = lora.sets, range(photos)
        else:
            trainables, lora = [stack.enter_context(MODES[run.tune.mode].trainables(base, run.tune, 0, False))], None
        if "tune" in run.stages:
            build = partial(PriorStage, Prior(latents, conditioning), 1.0) if run.prior else tune_stage
            stages = [build(base, latents, conditioning, one, two_steps(run.tune), 0, Processes()) for one in trainables]
            tune = training_peak(stages, run, tracker)
            yield "tune", tune
            if lora:
                lora.rows = [0]  # images are sampled with the layers of one photo
            if run.previews_every:
                held, activations = sampling_peaks(base, run, latents, conditioning, tracker)
                yield "preview", Peak(held - tune.optimizer, 0, tune.optimizer, max(activations.values()))
                base.offload_encoders()
            del stages
        held, activations = sampling_peaks(base, run, latents, conditioning, tracker)
        for name, peak in activations.items():
            yield name, Peak(held, 0, 0, peak)
