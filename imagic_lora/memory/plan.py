"""The peak of a run before it starts: how much memory every stage takes, and what for. No torch here: it answers at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from ..bases.architecture import Architecture
from ..bases.layers import LORA_TARGETS, text_parameters
from ..core.config import RunConfig
from .symbolic.layers import LayerOptions, Layers
from .symbolic.tape import Tape
from .symbolic.unet import UNet
from .symbolic.vae import vae_forward

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}
_CONTEXT = 500 * 2**20  # what a CUDA context and its libraries' kernels take, before any tensor
_LIBRARIES = 700 * 2**20  # of Python, PyTorch and diffusers in host memory
_FRAGMENTATION = 0.05  # of all but the weights, which are laid out once
_ROUNDING = 8  # bytes an element: bf16 weights are stepped and rounded on fp32 copies of weight and gradient


@dataclass(frozen=True)
class Assumed:
    """What ``auto`` is taken for where nobody asked a device.

    Args:
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        optimizer: ``adam8bit`` or ``adam``.
    """

    device: Literal["cuda", "cpu"]
    dtype: str
    optimizer: str


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a stage, and what holds them.

    Args:
        gradients: of weights; with the optimiser inside the backward pass none are held, and the one at hand is among the activations.
        activations: and all else that comes and goes.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without allowances."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fragmentation(self) -> int:
        """The stated allowance for what the allocator cannot use."""
        return int(_FRAGMENTATION * (self.total - self.weights))


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        context: allowance for the CUDA context; on a CPU for the libraries.
        host: bytes of host memory at the most.
        adapter, checkpoint: bytes on the disk: what is kept, and all that a resumed run would need.
    """

    assumed: Assumed
    stages: dict[str, Peak]
    context: int
    host: int
    adapter: int
    checkpoint: int

    @property
    def worst(self) -> str:
        """The stage with the highest peak."""
        return max(self.stages, key=self.needs)

    def needs(self, stage: str) -> int:
        """Bytes that a stage takes, allowances and all."""
        return self.stages[stage].total + self.stages[stage].fragmentation + self.context

    @property
    def peak_bytes(self) -> int:
        """Bytes that the whole run takes."""
        return self.needs(self.worst)

    def fits(self, preset: str) -> bool:
        """Whether it fits the size of card that a preset is for, if it is for one."""
        return not preset.endswith("gb") or self.peak_bytes <= int(preset.removesuffix("gb")) * 2**30

    def to_json(self) -> dict[str, Any]:
        """For ``plan --json``."""
        stages = {
            name: {**asdict(peak), "fragmentation": peak.fragmentation, "context": self.context, "peak_bytes": self.needs(name)}
            for name, peak in self.stages.items()
        }
        sizes = {"host_bytes": self.host, "adapter_bytes": self.adapter, "checkpoint_bytes": self.checkpoint}
        return {"peak_bytes": self.peak_bytes, "worst_stage": self.worst, "assumed": asdict(self.assumed), "stages": stages, **sizes}


def assume(run: RunConfig, device: Literal["cuda", "cpu"] | None = None) -> Assumed:
    """What ``auto`` is taken for: a card with bf16, unless the run says otherwise."""
    memory = run.memory
    where = device or ("cpu" if memory.device == "cpu" else "cuda")
    dtype = memory.dtype if memory.dtype != "auto" else ("bf16" if where == "cuda" else "fp32")
    optimizer = memory.optimizer if memory.optimizer != "auto" else ("adam8bit" if where == "cuda" else "adam")
    return Assumed(where, dtype, optimizer)


def passes(architecture: Architecture, run: RunConfig) -> int:
    """Passes through the denoiser for a step of the sampler: two where it is guided by an unconditional one."""
    return 2 if run.edit.guidance_scale > 1 and not architecture.embeds_guidance else 1


def comes_later(run: RunConfig, assumed: Assumed) -> bool:
    """Whether the denoiser is still in host memory while photo and sentence are encoded; one in 4 bits is made on the card."""
    return assumed.device == "cuda" and run.memory.idle != "keep" and run.memory.quantize == "none"


def predict(architecture: Architecture, run: RunConfig, assumed: Assumed | None = None) -> Plan:
    """The analytic plan, from a drawing of the models in sizes alone.

    Raises:
        NotDrawn: the U-Net has parts that cannot be drawn.
    """
    assumed = assumed or assume(run)
    writer = _Planner(architecture, run, assumed)
    return writer.plan(writer.stages())


def with_stages(architecture: Architecture, run: RunConfig, assumed: Assumed, stages: dict[str, Peak]) -> Plan:
    """A plan of these peaks, with what does not depend on how they were found."""
    return _Planner(architecture, run, assumed).plan(stages)


class _Planner:
    """Draws each stage of a run."""

    def __init__(self, architecture: Architecture, run: RunConfig, assumed: Assumed) -> None:
        self.architecture, self.run, self.assumed = architecture, run, assumed
        self.full = run.tune.mode == "full"
        self.width = _WIDTHS[assumed.dtype]
        self.pixels = (run.resolution or architecture.resolution) ** 2
        self.unet = self._denoiser_pass(tuned=True)[0]
        vae = self._vae(decode=True)[0], self._vae(decode=False)[0]
        self.vae = vae[0] + vae[1]
        texts = architecture.text_encoders.items()
        self.helpers = self.vae + self.width * sum(text_parameters(config, part == "text_encoder_2") for part, config in texts)
        eight = assumed.optimizer == "adam8bit"
        trained = self.unet.parameters if self.full else self.unet.lora
        self.states = (self.unet.states if self.full else self.unet.lora_states) if eight else 8 * trained

    def plan(self, stages: dict[str, Peak]) -> Plan:
        """The plan of these peaks."""
        embeddings = 3 * 4 * sum(prod(shape) for shape in self.architecture.conditioning.values())
        kept = 2 * self.unet.parameters if self.full else 4 * self.unet.lora
        trained = self.unet.bytes if self.full else 4 * self.unet.lora
        cuda = self.assumed.device == "cuda"
        return Plan(
            self.assumed,
            stages,
            context=_CONTEXT if cuda else _LIBRARIES,
            host=_LIBRARIES + (self.unet.bytes + self.helpers if cuda else max(peak.total for peak in stages.values())),
            adapter=kept + embeddings,
            checkpoint=trained + self.states + embeddings,
        )

    def stages(self) -> dict[str, Peak]:
        """The peak of every stage."""
        run, unet = self.run, self.unet
        around = unet.bytes + (self.helpers if run.memory.idle == "keep" else 0)
        lora = 0 if self.full else 4 * unet.lora
        pictures = around + lora + (0 if run.memory.idle == "keep" else self.vae)
        batch = run.edit.batch_size * passes(self.architecture, run)
        return {
            "encode": Peak(self.helpers + (0 if comes_later(run, self.assumed) else unet.bytes), 0, 0, self._vae(decode=False)[1]),
            "embed": Peak(around, 0, 0, self._denoiser_pass(batch=run.embed.batch_size, trains="embed")[1]),
            "tune": self._tune(around + lora),
            "sample": Peak(pictures, 0, 0, self._denoiser_pass(tuned=True, batch=batch)[1]),
            "decode": Peak(pictures, 0, 0, self._vae(decode=True, pictures=run.edit.batch_size)[1]),
        }

    def _tune(self, weights: int) -> Peak:
        inside = self.run.memory.optimizer_in_backward
        moving = self._denoiser_pass(tuned=True, batch=self.run.tune.batch_size, trains="tune")[1]
        gradients = 0 if inside else (self.unet.bytes if self.full else 4 * self.unet.lora)
        return Peak(weights, gradients, self.states, max(moving, gradients) - gradients)

    def _denoiser_pass(self, tuned: bool = False, batch: int = 1, trains: Literal["embed", "tune"] | None = None) -> tuple[Layers, int]:
        """The denoiser's layers, counted, and the most that one pass holds besides its weights.

        Args:
            tuned: it carries LoRA layers, or is trained itself.
            trains: what the backward pass is for; None for a pass without.
        """
        run, memory = self.run, self.run.memory
        rounded = self.full and memory.master_weights == "bf16-stochastic"
        tape = Tape(
            gradients_on=trains is not None,
            frees_gradients=memory.optimizer_in_backward,
            step_scratch=_ROUNDING if rounded and tuned else 0,
        )
        lora = tuned and not self.full
        options = LayerOptions(
            width=self.width,
            weights=4 if self.full and not rounded else self.width,
            trained=self.full and trains == "tune",
            rank=run.tune.rank if lora else 0,
            targets=LORA_TARGETS[run.tune.targets] if lora else (),
            four_bit=memory.quantize == "nf4",
            wide_norms=self.assumed.device == "cuda",
        )
        layers = Layers(tape, options, cache=[] if memory.autocast_cache and options.trained else None)  # autocast keeps what is trained
        unet = UNet(self.architecture.unet, layers, memory.gradient_checkpointing and trains is not None)
        tokens = self.architecture.conditioning["tokens"][1]
        out = unet.forward(self.pixels // self.architecture.factor**2, batch, tokens, tokens_need_grad=trains == "embed")
        counted, layers.cache = replace(layers, cache=None), None  # autocast clears it at the end of a forward pass
        if trains:
            tape.backward(out)
        return counted, tape.meter.peak

    def _vae(self, decode: bool, pictures: int = 1) -> tuple[int, int]:
        """Bytes of half the VAE, and the most that a pass through it holds."""
        memory, pixels = self.run.memory, self.pixels
        if memory.vae_tiling:
            pixels = min(pixels, self.architecture.vae["sample_size"] ** 2)
        width = 4 if self.architecture.wide_vae and self.assumed.dtype == "fp16" else self.width
        layers = Layers(Tape(gradients_on=False), LayerOptions(width, width))
        vae_forward(self.architecture.vae, layers, pixels, 1 if memory.vae_slicing else pictures, decode)
        return layers.bytes, layers.tape.meter.peak
