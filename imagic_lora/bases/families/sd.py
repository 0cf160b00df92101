"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, one U-Net, epsilon or v-prediction as the scheduler's config says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.errors import ImagicError, ImagicWarning
from ...core.runtime import Runtime
from ..architecture import Architecture
from ..base import Base, PipelineKind
from ..layers import LORA_TARGETS
from ..loading import components
from ..loading.files import Files, fingerprint
from ..loading.vetting import library_errors
from ..quantization import quantize_linear

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class StableDiffusion(Base):
    """A Stable Diffusion base over its components.

    Args:
        parts: ``unet``, ``vae``, ``scheduler``, and each text encoder with its tokenizer, on any device.
        reload: reads the VAE or a text encoder again, after it was released.
    """

    component = "unet"
    pipelines: ClassVar[dict[PipelineKind, Any]] = {"text2image": StableDiffusionPipeline, "image2image": StableDiffusionImg2ImgPipeline}
    unused_components: ClassVar[dict[str, Any]] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    """What its pipelines could hold and do not."""

    def __init__(
        self,
        architecture: Architecture,
        parts: dict[str, Any],
        name: str,
        revision: str | None,
        fingerprint: str,
        runtime: Runtime,
        reload: Callable[[str], Any],
    ) -> None:
        super().__init__(name, revision, fingerprint, runtime, dict(parts["scheduler"].config))
        self.architecture = architecture
        self._unet, self._scheduler = parts["unet"], parts["scheduler"]
        self._tokenizers = {TOKENIZERS[encoder]: parts[TOKENIZERS[encoder]] for encoder in architecture.text_encoders}
        self._helpers: dict[str, Any] = {helper: parts[helper] for helper in ("vae", *architecture.text_encoders)}
        self._reload = reload
        self.trained_timesteps = components.distilled_timesteps(parts["scheduler"], architecture.few_steps)
        self._scaling = parts["vae"].config.scaling_factor
        self.size_multiple = math.lcm(8, architecture.factor)  # diffusers' pipelines ask for multiples of 8
        self.resolution = architecture.resolution
        self.freeze(self._unet)
        if runtime.memory.quantize == "nf4":
            quantize_linear(self._unet, runtime.dtype, runtime.device)
        if runtime.memory.idle == "keep":
            self._move(self._unet)
            for helper in self._helpers:
                self._on_device(helper)
        if runtime.memory.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
        if runtime.memory.attention == "xformers":
            try:
                self._unet.enable_xformers_memory_efficient_attention()
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                raise ImagicError(
                    f"xformers does not work here ({error})", "a build for this PyTorch and card", "use --attention sdpa"
                ) from error

    @classmethod
    def load(cls, files: Files, name: str, revision: str | None, runtime: Runtime, master_weights: bool = False) -> StableDiffusion:
        """A base from its files.

        Args:
            master_weights: loads the U-Net as the thing that is trained in full: in fp32 whatever the precision of the arithmetic, unless
                the runtime asks for bf16 weights.
        """
        built = files.architecture
        master = torch.float32 if master_weights and runtime.memory.master_weights == "fp32" else runtime.dtype

        def helper(part: str) -> Any:
            if part == "vae":
                return components.model(AutoencoderKL, built.vae, files, part, vae_dtype(built, runtime.dtype))
            return components.text_encoder(built.text_encoders[part], files, part, runtime.dtype)

        parts = {
            "unet": components.model(UNet2DConditionModel, built.unet, files, "unet", master),
            "scheduler": components.scheduler(built.scheduler, files, built.few_steps),
            "vae": helper("vae"),
        }
        for encoder, config in built.text_encoders.items():
            parts[encoder] = helper(encoder)
            parts[TOKENIZERS[encoder]] = components.tokenizer(config, files, TOKENIZERS[encoder])
        with library_errors(files.path):  # a pipeline mends the configs of its early days
            cls.pipelines["text2image"](**parts, **cls.unused_components)
        mark = fingerprint(files, ("unet", *built.text_encoders), parts["scheduler"].config.prediction_type)
        return cls(built, parts, name, revision, mark, runtime, helper)

    def offload_encoders(self) -> None:
        idle = self.runtime.memory.idle
        for name, helper in self._helpers.items():
            if helper is not None and idle != "keep":
                self._helpers[name] = helper.to("cpu") if idle == "offload" else None
        self._move(self._unet)

    def _move(self, module: Any) -> None:
        """A module to the device. What is not kept there comes when it is first used: the U-Net after photo and sentence are encoded."""
        if next(module.parameters()).device != self.runtime.device:
            module.to(self.runtime.device)

    def _on_device(self, name: str) -> Any:
        """A helper on the device."""
        if self._helpers[name] is None:
            self._helpers[name] = self._reload(name)
        helper = self._helpers[name]
        self.freeze(helper)
        self._move(helper)
        if name == "vae":
            memory = self.runtime.memory
            (helper.enable_tiling if memory.vae_tiling else helper.disable_tiling)()
            (helper.enable_slicing if memory.vae_slicing else helper.disable_slicing)()
        return helper

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self._unet

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditioning:
        return Conditioning(self._on_device("text_encoder")(self._ids("tokenizer", prompt))[0].float())

    def _ids(self, name: str, prompt: str) -> Tensor:
        """The tokens of a prompt, ``[1, T]``; warns with what was cut."""
        tokenizer = self._tokenizers[name]
        limit, everything = tokenizer.model_max_length, tokenizer(prompt).input_ids
        if len(everything) > limit:
            lost = tokenizer.decode(everything[limit - 1 : -1])
            message = f"the prompt is longer than the {limit - 2} tokens this base reads; lost: {lost!r}"
            warnings.warn(message, ImagicWarning, stacklevel=4)
        ids = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return ids.to(self.runtime.device)

    def null(self) -> Conditioning | None:
        return None if self.architecture.embeds_guidance else self.encode_prompt("")

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        if not self.architecture.embeds_guidance:
            return conditioning
        guidance = torch.full((1,), guidance_scale, device=conditioning.tokens.device)
        return replace(conditioning, extra={**conditioning.extra, "guidance": guidance})

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the U-Net is told beside the tokens, as its own arguments."""
        if not self.architecture.embeds_guidance:
            return {}
        scale, size = conditioning.extra["guidance"], self.architecture.unet["time_cond_proj_dim"]
        told = get_timestep_embedding((scale - 1) * 1000, size, downscale_freq_shift=1)  # arXiv 2310.04378, appendix; as diffusers has it
        return {"timestep_cond": told.to(conditioning.tokens.dtype)}

    def pipeline_kwargs(self, text: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        return {"prompt_embeds": text.tokens, "negative_prompt_embeds": None if null is None else null.tokens}

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        vae = self._on_device("vae")
        return vae.encode(image.to(self.runtime.device, vae.dtype)).latent_dist.mode().float() * self._scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._on_device("vae")
        return vae.decode(latents.to(self.runtime.device, vae.dtype) / self._scaling).sample.float()

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self._move(self._unet)
        told, dtype = conditioning.expand(len(x_t)).to(x_t.device, self._unet.dtype), self._unet.dtype
        mixed = dtype == torch.float32 and self.runtime.dtype != torch.float32
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=mixed, cache_enabled=self.runtime.memory.autocast_cache):
            return self._unet(x_t.to(dtype), timesteps, told.tokens, **self.added_conditions(told)).sample

    def lora_targets(self, preset: str) -> list[str]:
        return list(LORA_TARGETS[preset])

    def scheduler(self) -> Any:
        return type(self._scheduler).from_config(self._scheduler.config)

    def pipeline(self, kind: PipelineKind) -> Any:
        self._move(self._unet)
        pipe = self.pipelines[kind](
            vae=self._on_device("vae"),
            **dict.fromkeys(self.architecture.text_encoders),  # none: it is given embeddings, and would run where its text encoder does
            **self._tokenizers,
            unet=self._unet,
            scheduler=self.scheduler(),
            **self.unused_components,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def vae_dtype(architecture: Architecture, dtype: torch.dtype) -> torch.dtype:
    """The precision of the VAE: that of the rest, but for one that overflows in fp16 and paints black pictures."""
    return torch.float32 if architecture.wide_vae and dtype == torch.float16 else dtype
