"""What every model family answers, and nothing else. The floors above never ask which family it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import ImagicError
from ..core.runtime import Runtime
from .architecture import Architecture

PipelineKind = Literal["text2image", "image2image"]


class Base(ABC):
    """A loaded text-to-image model, frozen.

    Args:
        name: as the user gave it: a known name, a folder, or a hub id.
        revision: of a hub id.
        fingerprint: equal for the same weights in fp16 and fp32.
        runtime: its device, precision and levers.
        declared: config of the scheduler that the base declares; it only samples. Training noises with a DDPM scheduler of the same
            schedule, because the declared one may be of a kind whose ``add_noise`` means something else.
    """

    component: Literal["unet", "transformer"]
    """The part that is trained."""
    pipelines: ClassVar[dict[PipelineKind, type[DiffusionPipeline]]]
    """The pipelines that :meth:`pipeline` makes."""
    size_multiple: int
    """Sides of a picture are multiples of this many pixels."""
    resolution: int
    """Side of the square pictures it was made for, in pixels."""
    architecture: Architecture
    """The configs of its components."""
    trained_timesteps: Tensor | None = None
    """The timesteps that a distilled base samples at, the only ones it is trained at; None for all."""

    def __init__(self, name: str, revision: str | None, fingerprint: str, runtime: Runtime, declared: dict[str, object]) -> None:
        self.name, self.revision, self.fingerprint, self.runtime = name, revision, fingerprint, runtime
        self.training: Any = DDPMScheduler.from_config(declared)
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ImagicError(f"{name} predicts {self.prediction_type!r}", "epsilon, v_prediction or sample", "choose another base")

    @property
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction`` or ``sample``: what the denoiser was trained to predict."""
        return self.training.config.prediction_type

    @property
    @abstractmethod
    def denoiser(self) -> ModelMixin:
        """The module that stage 2 trains."""

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, ``B = 1``, fp32. Warns with what was cut if the prompt is longer than the model reads."""

    @abstractmethod
    def null(self) -> Conditioning | None:
        """The unconditional conditioning, for guidance; None where the base is not to be guided."""

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        """The conditioning with what the family is told beside the text, as extra inputs.

        Args:
            height, width: of the picture, in pixels.
            guidance_scale: that pictures are to be made with, for families that embed it.
        """
        return conditioning

    @abstractmethod
    def pipeline_kwargs(self, text: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        """The arguments by which a pipeline is told a conditioning, and the unconditional one where it is to be guided."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Scaled latents ``[1, C, h, w]`` fp32 of an image ``[1, 3, H, W]`` in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The counterpart of :meth:`encode_image`."""

    @abstractmethod
    def offload_encoders(self) -> None:
        """Says that only the denoiser is needed for a while: the rest goes where ``idle`` says, and comes back when it is used."""

    @abstractmethod
    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output ``[B, C, h, w]`` for noisy latents and timesteps ``[B]``; a conditioning of one is broadcast."""

    @abstractmethod
    def lora_targets(self, preset: str) -> list[str]:
        """Names of the layers that LoRA adapts: ``attention``, ``attention+conv``, or ``all`` linear and convolutional ones."""

    @abstractmethod
    def scheduler(self) -> Any:
        """A fresh scheduler of the declared kind."""

    @abstractmethod
    def pipeline(self, kind: PipelineKind) -> DiffusionPipeline:
        """A diffusers pipeline over the components in memory, with a fresh scheduler of the declared kind."""

    def timesteps(self, times: Tensor) -> Tensor:
        """Training timesteps, int64, for times in [0, 1)."""
        if self.trained_timesteps is not None:
            return self.trained_timesteps[(times * len(self.trained_timesteps)).long()]
        return (times * self.training.config.num_train_timesteps).long()

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``: equation 4 of DDPM (arXiv 2006.11239)."""
        return self.training.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer: the noise, ``v = sqrt(a_t) noise - sqrt(1 - a_t) x_0`` (arXiv 2202.00512), or the sample."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.training.get_velocity(clean, noise, timesteps)
        return clean

    def freeze(self, *modules: torch.nn.Module) -> None:
        """No gradients, evaluation mode."""
        for module in modules:
            module.requires_grad_(False).eval()
