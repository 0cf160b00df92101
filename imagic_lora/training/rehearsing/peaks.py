"""The peak of one training stage or sampling, measured while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...bases.families.common import LatentBase
from ...core.conditioning import Conditioning
from ...core.config import RunConfig
from ...core.runtime import Processes
from ...memory.plan import Peak, passes_per_step
from ...memory.tracker import Tracker
from ..monitoring.convergence import fixed_losses
from ..shared import run_together
from ..stage import Stage
from ..updating.updates import JointUpdates


def two_steps(config: Any) -> Any:
    """The settings of a stage with two steps: the first creates the states of the optimizer."""
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


def training_peak(stages: Sequence[Stage], run: RunConfig, tracker: Tracker) -> Peak:
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
def sampling_peaks(
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
