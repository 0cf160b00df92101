"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, one U-Net, epsilon or v-prediction as the scheduler's config says."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ..conditioning import Conditioning
from ..errors import ImagicError, ImagicWarning
from ..runtime import Runtime
from .base import Base, PipelineKind
from .files import fingerprint, variant

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_TARGETS = {"attention": _ATTENTION, "attention+conv": [*_ATTENTION, "conv1", "conv2"]}


class StableDiffusion(Base):
    """A Stable Diffusion base from a folder in diffusers' own format.

    Args:
        folder: holds ``model_index.json`` and a folder for each component, in safetensors.
        master_weights: keeps the U-Net in fp32 whatever the precision of the arithmetic, for full fine-tuning.
    """

    component = "unet"

    def __init__(self, folder: Path, name: str, revision: str | None, runtime: Runtime, master_weights: bool = False) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=runtime.dtype,
            variant=variant(folder),
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
        super().__init__(name, revision, fingerprint(folder, ("unet", "text_encoder")), runtime, dict(pipe.scheduler.config))
        self._unet: Any = pipe.unet  # diffusers' models are loosely annotated
        if master_weights and runtime.dtype != torch.float32:
            self._unet = UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", dtype=torch.float32, variant=variant(folder), use_safetensors=True, local_files_only=True
            )
        self._vae: Any = pipe.vae
        self._text, self._tokenizer, self._scheduler = pipe.text_encoder, pipe.tokenizer, pipe.scheduler
        self._factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self.size_multiple = math.lcm(8, self._factor)  # diffusers' pipelines ask for multiples of 8
        self.resolution = self._unet.config.sample_size * self._factor
        self.freeze(self._unet, self._vae, self._text)
        for module in (self._unet, self._vae, self._text):
            module.to(runtime.device)
        if runtime.checkpointing:
            self._unet.enable_gradient_checkpointing()
        if runtime.attention == "xformers":
            try:
                self._unet.enable_xformers_memory_efficient_attention()
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                raise ImagicError(
                    f"xformers does not work here ({error})", "a build for this PyTorch and card", "use --attention sdpa"
                ) from error

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self._unet

    @torch.no_grad()
    def encode_text(self, prompt: str) -> Conditioning:
        limit = self._tokenizer.model_max_length
        everything = self._tokenizer(prompt).input_ids
        if len(everything) > limit:
            lost = self._tokenizer.decode(everything[limit - 1 : -1])
            message = f"the prompt is longer than the {limit - 2} tokens this base reads; lost: {lost!r}"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        ids = self._tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return Conditioning(self._text(ids.to(self.runtime.device))[0].float())

    def null(self) -> Conditioning:
        return self.encode_text("")

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        posterior = self._vae.encode(image.to(self.runtime.device, self._vae.dtype)).latent_dist
        return posterior.mode().float() * self._vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.runtime.device, self._vae.dtype) / self._vae.config.scaling_factor
        return self._vae.decode(scaled).sample.float()

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = conditioning.expand(len(x_t)).tokens
        mixed = self._unet.dtype == torch.float32 and self.runtime.dtype != torch.float32
        # the autocast weight cache would hold a second copy of the U-Net
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=mixed, cache_enabled=False):
            return self._unet(x_t.to(self._unet.dtype), timesteps, tokens.to(self._unet.dtype)).sample

    def lora_targets(self, preset: str) -> list[str]:
        return _TARGETS[preset]

    def pipeline(self, kind: PipelineKind) -> StableDiffusionPipeline | StableDiffusionImg2ImgPipeline:
        cls = StableDiffusionPipeline if kind == "text2image" else StableDiffusionImg2ImgPipeline
        pipe = cls(
            vae=self._vae,
            text_encoder=self._text,
            tokenizer=self._tokenizer,
            unet=self._unet,
            scheduler=type(self._scheduler).from_config(self._scheduler.config),
            safety_checker=None,  # pyright: ignore[reportArgumentType]  # optional in diffusers, though not in its annotation
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
