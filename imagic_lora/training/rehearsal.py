"""The exact memory plan: training, sampling and decoding run on fake tensors, and every tensor is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Linear, Module, Parameter
from torch.utils._python_dispatch import _disable_current_modes
from transformers import BatchEncoding

from ..adapters.batched import batched
from ..adapters.modes import MODES
from ..bases.architecture import LARGE_ENCODERS, Architecture, UNetArchitecture
from ..bases.families.common import LatentBase, tokenizer_of, vae_dtype
from ..bases.loading.components import TEXT_ENCODERS
from ..bases.loading.registry import family_of
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.runtime import DTYPES, Processes, Runtime
from ..memory.optimizer_states import state_bytes
from ..memory.plan import Assumed, Peak, Plan, denoiser_waits_in_host_memory, passes_per_step, plan_from_peaks
from ..memory.rehearsed import Rehearsed, remember
from ..memory.tracker import Tracker
from ..memory.trained import CountedWeights
from .embed import embed_stage
from .monitoring.convergence import fixed_losses
from .optimizers import JointUpdates
from .prior import Prior, PriorStage
from .shared import run_together
from .stage import Stage
from .tune import tune_stage


def _in_fp32_under_autocast(normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Casts the inputs of a normalization function to fp32 under autocast, as PyTorch does on CUDA and not on the CPU."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return normalize(*args, **kwargs)

    return function


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Makes autocast on the CPU use the precisions of autocast on CUDA."""
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(F, name, _in_fp32_under_autocast(getattr(F, name))))
        yield


def rehearse(architecture: Architecture, run: RunConfig, assumed: Assumed, photos: int = 1) -> Plan:
    """The plan that :func:`imagic_lora.memory.plan.predict` estimates, from a count of every tensor.

    The real code runs on fake tensors of the true sizes: nothing is computed, and their memory is not allocated. Modules of the same size
    replace those of bitsandbytes. Workspace inside kernels is not counted. What is counted for a flow is kept for later
    (:mod:`imagic_lora.memory.rehearsed`).

    Args:
        architecture: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer of the plan.
        photos: number of photos that are fitted together.

    Raises:
        NotPlanned: as :func:`imagic_lora.memory.plan.predict`.
    """
    # all fake tensors are on the CPU, where offloading would move nothing; releasing removes the same bytes from the device
    idle = "keep" if run.memory.idle == "keep" else "release"
    memory = run.memory.model_copy(update={"idle": idle, "attention": "sdpa"})
    runtime = Runtime(torch.device("cpu"), DTYPES[assumed.dtype], assumed.optimizer, memory, {})
    with FakeTensorMode(), patch.object(Module, "_apply", _convert), Tracker() as tracker:
        base = random_base(architecture, run, runtime)
        base.load_encoders()
        helpers = dict(zip(("vae", *architecture.text_encoders), base.helper_bytes(), strict=True))
        counts = None if isinstance(architecture, UNetArchitecture) else counted(base, run)
        with _cuda_autocast() if assumed.device == "cuda" else nullcontext():
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


def _convert(module: Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
    """Replaces ``Module._apply``, which swaps fake tensors in place and fails if a weak reference to one exists."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, weight in module._parameters.items():
            module._parameters[name] = None if weight is None else Parameter(change(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return module


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
        held, activations = _sampling_peaks(base, run, latents, conditioning, tracker)
        yield "class", Peak(held, 0, 0, max(activations.values()))
        base.offload_encoders()
    if run.encodes_while_training:  # the vectors of a whole prompt also stand for those of a new word
        conditioning = replace(conditioning, vectors=base.encode_vectors("").vectors)
    else:
        base.offload_encoders()
    if "embed" in run.stages:
        stages = [embed_stage(base, latents, conditioning, _two_steps(run.embed), 0, Processes()) for _ in range(photos)]
        yield "embed", _training_peak(stages, run, tracker)
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
            stages = [build(base, latents, conditioning, one, _two_steps(run.tune), 0, Processes()) for one in trainables]
            tune = _training_peak(stages, run, tracker)
            yield "tune", tune
            if lora:
                lora.rows = [0]  # images are sampled with the layers of one photo
            if run.previews_every:
                held, activations = _sampling_peaks(base, run, latents, conditioning, tracker)
                yield "preview", Peak(held - tune.optimizer, 0, tune.optimizer, max(activations.values()))
                base.offload_encoders()
            del stages
        held, activations = _sampling_peaks(base, run, latents, conditioning, tracker)
        for name, peak in activations.items():
            yield name, Peak(held, 0, 0, peak)


def _two_steps(config: Any) -> Any:
    return config.model_copy(update={"steps": 2})


def _step(stages: Sequence[Stage], k: int) -> None:
    """A step of one stage, or of the stages of photos that are fitted together."""
    if len(stages) == 1:
        stages[0].step(k)
    else:
        steps = [stage.shared_step(k) for stage in stages]
        run_together([next(step) for step in steps])
        for step in steps:
            next(step, None)


def _training_peak(stages: Sequence[Stage], run: RunConfig, tracker: Tracker) -> Peak:
    """The peak of a training stage with the states of the optimizer, which its first step creates.

    If one optimizer steps after the backward pass, the states are added to the peak of the first passes; otherwise a second step is made.
    The peak includes an evaluation of the relative loss, which needs less than the step.
    """
    weights, stage, passes = tracker.now, stages[0], list[int]()
    update = stage.updates.apply

    def apply(step: int, processes: Processes) -> None:
        passes.append(tracker.peak)
        tracker.reset_peak()
        update(step, processes)

    tracker.reset_peak()
    with patch.object(stage.updates, "apply", apply):
        _step(stages, 0)
    states = tracker.now - weights
    if len(stages) == 1 and isinstance(stage.updates, JointUpdates):
        peak = max(passes[0] + states, tracker.peak)
    else:
        tracker.reset_peak()
        _step(stages, 1)
        peak = tracker.peak
    tracker.reset_peak()
    if run.monitoring.convergence_every and len(stages) == 1:
        fixed_losses(stage.base, stage.latents, stage.conditioning(), stage.seed, stage.config.batch_size, calls=1)
    inside = stage.base.runtime.memory.optimizer_in_backward
    gradients = 0 if inside else sum(p.numel() * p.element_size() for one in stages for p in one.trainables.values())
    peak = max(peak, tracker.peak)
    return Peak(weights, gradients, states, peak - weights - gradients - states)


@torch.no_grad()
def _sampling_peaks(
    base: LatentBase, run: RunConfig, latents: Tensor, conditioning: Conditioning, tracker: Tracker
) -> tuple[int, dict[str, int]]:
    """Runs one pass of the denoiser and the decoding of a batch of images.

    Returns:
        The bytes that are held before, and those that ``sample`` and ``decode`` allocate at their peak.
    """
    image = torch.empty(1, 3, *(side * base.architecture.vae_scale_factor for side in latents.shape[2:]))
    encoded = base.encode_image(image)  # loads the VAE
    if run.edit.reference:
        conditioning = base.with_reference(conditioning, encoded)
    del image, encoded
    held, count, activations = tracker.now, run.edit.batch_size, dict[str, int]()
    tracker.reset_peak()
    batch = count * passes_per_step(base.architecture, run)
    noisy, times = latents.expand(batch, -1, -1, -1).to(base.denoiser.dtype), torch.zeros(batch, dtype=torch.int64)
    dtype = base.runtime.dtype
    with torch.autocast("cpu", dtype, enabled=base.denoiser.dtype != dtype, cache_enabled=False):  # as in generate()
        base.denoise(noisy, times, conditioning.expand(batch).to(noisy.device, dtype))
    activations["sample"] = tracker.peak - held
    del noisy, times  # a sampler has let go of them when an image is decoded
    tracker.reset_peak()
    base.decode(latents.expand(count, -1, -1, -1))
    activations["decode"] = tracker.peak - held
    return held, activations
