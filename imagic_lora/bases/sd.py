"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, one U-Net, epsilon or v-prediction as the scheduler's config says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ..conditioning import Conditioning
from ..errors import ImagicError, ImagicWarning
from ..runtime import Runtime
from . import components
from .base import Base, PipelineKind
from .blueprint import LORA_TARGETS
from .files import fingerprint
from .published import Architecture, read_architecture
from .quantized import quantize_linear
from .vetting import vetted_index

HELPERS = ("vae", "text_encoder")


class StableDiffusion(Base):
    """A Stable Diffusion base over its components.

    Args:
        parts: ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``, on any device.
        reload: reads ``vae`` or ``text_encoder`` again, after it was released.
    """

    component = "unet"
    pipelines: ClassVar[dict[PipelineKind, Any]] = {"text2image": StableDiffusionPipeline, "image2image": StableDiffusionImg2ImgPipeline}

    def __init__(
        self, parts: dict[str, Any], name: str, revision: str | None, fingerprint: str, runtime: Runtime, reload: Callable[[str], Any]
    ) -> None:
        super().__init__(name, revision, fingerprint, runtime, dict(parts["scheduler"].config))
        self._unet, self._tokenizer, self._scheduler = parts["unet"], parts["tokenizer"], parts["scheduler"]
        self._helpers: dict[str, Any] = {helper: parts[helper] for helper in HELPERS}
        self._reload = reload
        config = parts["vae"].config
        self._scaling, self._factor = config.scaling_factor, 2 ** (len(config.block_out_channels) - 1)
        self.size_multiple = math.lcm(8, self._factor)  # diffusers' pipelines ask for multiples of 8
        self.resolution = self._unet.config.sample_size * self._factor
        self.architecture = Architecture(
            dict(self._unet.config), dict(config), parts["text_encoder"].config.to_dict(), dict(self._scheduler.config)
        )
        self.freeze(self._unet)
        if runtime.memory.quantize == "nf4":
            quantize_linear(self._unet, runtime.dtype, runtime.device)
        self._move(self._unet)
        for helper in HELPERS:
            self._awake(helper)
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
    def load(cls, folder: Path, name: str, revision: str | None, runtime: Runtime, master_weights: bool = False) -> StableDiffusion:
        """A base from a folder in diffusers' own format.

        Args:
            folder: holds ``model_index.json`` and a folder for each component, in safetensors.
            master_weights: loads the U-Net as the thing that is trained in full: in fp32 whatever the precision of the arithmetic, unless
                the runtime asks for bf16 weights.
        """
        index, built = vetted_index(folder), read_architecture(folder)
        master = torch.float32 if master_weights and runtime.memory.master_weights == "fp32" else runtime.dtype

        def helper(name: str) -> Any:
            if name == "vae":
                return components.model(AutoencoderKL, built.vae, folder, "vae", runtime.dtype)
            return components.text_encoder(built.text_encoder, folder, runtime.dtype)

        parts = {
            "unet": components.model(UNet2DConditionModel, built.unet, folder, "unet", master),
            "tokenizer": components.tokenizer(built.text_encoder, folder),
            "scheduler": components.scheduler(index["scheduler"][1], built.scheduler, folder),
            **{name: helper(name) for name in HELPERS},
        }
        with components.library_on(folder):  # a pipeline mends the configs of its early days
            StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # pyright: ignore
        mark = fingerprint(folder, ("unet", "text_encoder"))
        return cls(parts, name, revision, mark, runtime, helper)

    def rest(self) -> None:
        idle = self.runtime.memory.idle
        for name, helper in self._helpers.items():
            if helper is not None and idle != "keep":
                self._helpers[name] = helper.to("cpu") if idle == "offload" else None

    def _move(self, module: Any) -> None:
        if any(one.device != self.runtime.device for one in (*module.parameters(), *module.buffers())):
            module.to(self.runtime.device)

    def _awake(self, name: str) -> Any:
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
    def encode_text(self, prompt: str) -> Conditioning:
        limit = self._tokenizer.model_max_length
        everything = self._tokenizer(prompt).input_ids
        if len(everything) > limit:
            lost = self._tokenizer.decode(everything[limit - 1 : -1])
            message = f"the prompt is longer than the {limit - 2} tokens this base reads; lost: {lost!r}"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        ids = self._tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return Conditioning(self._awake("text_encoder")(ids.to(self.runtime.device))[0].float())

    def null(self) -> Conditioning:
        return self.encode_text("")

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        vae = self._awake("vae")
        return vae.encode(image.to(self.runtime.device, vae.dtype)).latent_dist.mode().float() * self._scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._awake("vae")
        return vae.decode(latents.to(self.runtime.device, vae.dtype) / self._scaling).sample.float()

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = conditioning.expand(len(x_t)).tokens
        mixed = self._unet.dtype == torch.float32 and self.runtime.dtype != torch.float32
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=mixed, cache_enabled=self.runtime.memory.autocast_cache):
            return self._unet(x_t.to(self._unet.dtype), timesteps, tokens.to(self._unet.dtype)).sample

    def lora_targets(self, preset: str) -> list[str]:
        return list(LORA_TARGETS[preset])

    def pipeline(self, kind: PipelineKind) -> StableDiffusionPipeline | StableDiffusionImg2ImgPipeline:
        pipe = self.pipelines[kind](
            vae=self._awake("vae"),
            text_encoder=None,  # it is given embeddings; and it would run where, and as precisely as, its text encoder does
            tokenizer=self._tokenizer,
            unet=self._unet,
            scheduler=type(self._scheduler).from_config(self._scheduler.config),
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
