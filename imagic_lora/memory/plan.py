"""The plan of a run: the peak memory of every stage, and what it assumes. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..bases.architecture import Architecture
from ..core.config import RunConfig
from ..core.machine import free_host_memory

_FRAGMENTATION = 0.05  # of everything but the weights, which are allocated once


@dataclass(frozen=True)
class Assumed:
    """The values that a plan uses for settings that are ``auto``.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``.
    """

    device: Literal["cuda", "cpu"]
    dtype: str
    optimizer: str


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a stage, by what holds them.

    Args:
        weights: of all models that are in memory during the stage.
        gradients: of weights. 0 where the optimizer steps inside the backward pass; the one gradient that exists at a time is then part of
            the activations.
        optimizer: states of the optimizer.
        activations: all other tensors, which are allocated and freed during the stage.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    def times(self, count: int, added: int) -> Peak:
        """What the stage holds for several photos in one batch: all but the weights so many times, and ``added`` bytes of weights more."""
        return Peak(self.weights + added, count * self.gradients, count * self.optimizer, count * self.activations)

    @property
    def total(self) -> int:
        """The sum, without allowances."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fragmentation(self) -> int:
        """Allowance for memory that the allocator reserves and cannot use, in bytes."""
        return int(_FRAGMENTATION * (self.total - self.weights))


@dataclass(frozen=True)
class Plan:
    """The predicted memory and disk space of a run.

    Args:
        assumed: device, precision and optimizer that the plan is for.
        stages: the peak of every stage, by name.
        context: allowance for the CUDA context; on a CPU for Python and its libraries. In bytes.
        host: peak of the host memory, in bytes.
        adapter: bytes of the adapter on disk.
        checkpoint: bytes of a checkpoint on disk, from which a run can resume.
    """

    assumed: Assumed
    stages: dict[str, Peak]
    context: int
    host: int
    adapter: int
    checkpoint: int

    @property
    def worst(self) -> str:
        """The name of the stage with the highest peak."""
        return max(self.stages, key=self.needs)

    def needs(self, stage: str) -> int:
        """Bytes that a stage needs, allowances included."""
        return self.stages[stage].total + self.stages[stage].fragmentation + self.context

    @property
    def peak_bytes(self) -> int:
        """Bytes that the whole run needs, allowances included."""
        return self.needs(self.worst)

    def fits(self, preset: str) -> bool:
        """Whether the run fits the card that a preset is named after, or on a CPU the memory that is free on this machine."""
        if self.assumed.device == "cpu":
            return self.peak_bytes <= free_host_memory()
        return not preset.endswith("gb") or self.peak_bytes <= int(preset.removesuffix("gb")) * 2**30

    def to_json(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        stages = {
            name: {**asdict(peak), "fragmentation": peak.fragmentation, "context": self.context, "peak_bytes": self.needs(name)}
            for name, peak in self.stages.items()
        }
        sizes = {"host_bytes": self.host, "adapter_bytes": self.adapter, "checkpoint_bytes": self.checkpoint}
        return {"peak_bytes": self.peak_bytes, "worst_stage": self.worst, "assumed": asdict(self.assumed), "stages": stages, **sizes}


def assume(run: RunConfig, device: Literal["cuda", "cpu"] | None = None) -> Assumed:
    """Replaces every ``auto`` of a run without looking at the machine.

    Args:
        run: explicit settings are kept.
        device: None for the device of the run, where ``auto`` counts as a card with bf16.
    """
    memory = run.memory
    chosen = device or ("cpu" if memory.device == "cpu" else "cuda")
    dtype = memory.dtype if memory.dtype != "auto" else ("bf16" if chosen == "cuda" else "fp32")
    optimizer = memory.optimizer if memory.optimizer != "auto" else ("adam8bit" if chosen == "cuda" else "adam")
    return Assumed(chosen, dtype, optimizer)


def passes_per_step(architecture: Architecture, run: RunConfig) -> int:
    """Number of samples that one image takes in a pass through the denoiser: 2 with classifier-free guidance, 1 without.

    A flow takes the passes of guidance one after the other.
    """
    return 2 if run.edit.guidance_scale > 1 and architecture.guidance == "cfg" and architecture.process == "diffusion" else 1


def sampled_at_once(architecture: Architecture, run: RunConfig) -> int:
    """Number of samples in a pass through the denoiser while images are sampled."""
    return run.edit.batch_size * passes_per_step(architecture, run)


def denoiser_waits_in_host_memory(run: RunConfig, assumed: Assumed) -> bool:
    """Whether the denoiser stays in host memory while photo and prompt are encoded; one that is quantized moves to the card at once."""
    return assumed.device == "cuda" and run.memory.idle != "keep" and run.memory.quantize == "none"
