"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net, and the prediction type of the scheduler's config."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.config import Scheduler
from ...core.errors import ImagicError, ImagicWarning
from ...core.runtime import Runtime
from ..architecture import Architecture
from ..base import Base, PipelineKind
from ..layers import LORA_TARGETS
from ..loading import components, schedulers
from ..loading.files import Files, fingerprint
from ..loading.vetting import library_errors
from ..quantization import quantize_linear

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Component name of the tokenizer by component name of its text encoder."""


class StableDiffusion(Base):
    """A Stable Diffusion base.

    Args:
        architecture: configs of the components.
        parts: the components by name: ``unet``, ``vae``, ``scheduler``, each text encoder and its tokenizer, on any device.
        name, revision, fingerprint, runtime: as in :class:`~imagic_lora.bases.base.Base`.
        reload: reads a component (the VAE or a text encoder) again after it was released. Its argument is the component's name.

    Raises:
        ImagicError: ``--attention xformers`` without a working xformers.
    """

    component = "unet"
    pipelines: ClassVar[dict[PipelineKind, Any]] = {"text2image": StableDiffusionPipeline, "image2image": StableDiffusionImg2ImgPipeline}
    unused_components: ClassVar[dict[str, Any]] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    """Optional arguments of the pipeline classes, set so that the pipelines have none of these components."""

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
        super().__init__(name, revision, fingerprint, runtime, schedulers.training_scheduler(parts["scheduler"]))
        self.architecture = architecture
        self._unet, self._scheduler = parts["unet"], parts["scheduler"]
        self._tokenizers = {TOKENIZERS[encoder]: parts[TOKENIZERS[encoder]] for encoder in architecture.text_encoders}
        self._helpers: dict[str, Any] = {helper: parts[helper] for helper in ("vae", *architecture.text_encoders)}
        self._reload = reload
        self._half_moved: WeakSet[Any] = WeakSet()  # modules whose move was interrupted: some of their tensors are elsewhere
        self.trained_timesteps = schedulers.distilled_timesteps(parts["scheduler"], architecture.few_steps)
        self._scaling = parts["vae"].config.scaling_factor
        self.size_multiple = math.lcm(8, architecture.vae_scale_factor)  # diffusers' pipelines require multiples of 8
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
            self._enable_xformers()

    def _enable_xformers(self) -> None:
        try:
            self._unet.enable_xformers_memory_efficient_attention()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ImagicError(
                f"xformers does not work on this machine ({error})",
                "an xformers build for the installed PyTorch and this GPU",
                "use --attention sdpa",
            ) from error

    @classmethod
    def load(cls, files: Files, name: str, revision: str | None, runtime: Runtime, master_weights: bool = False) -> StableDiffusion:
        """Loads a base from its files.

        Args:
            files: folder or single file of the base.
            name, revision, runtime: as in :class:`~imagic_lora.bases.base.Base`.
            master_weights: True for full fine-tuning: the U-Net is loaded in fp32, unless the runtime's ``master_weights`` is
                ``bf16-stochastic``. False: the U-Net has the runtime's precision.

        Raises:
            ImagicError: a component cannot be read, or does not match its config.
        """
        architecture = files.architecture
        unet_dtype = torch.float32 if master_weights and runtime.memory.master_weights == "fp32" else runtime.dtype

        def helper(part: str) -> Any:
            if part == "vae":
                return components.model(AutoencoderKL, architecture.vae, files, part, vae_dtype(architecture, runtime.dtype))
            return components.text_encoder(architecture.text_encoders[part], files, part, runtime.dtype)

        parts = {
            "unet": components.model(UNet2DConditionModel, architecture.unet, files, "unet", unet_dtype),
            "scheduler": schedulers.scheduler(architecture.scheduler, files, architecture.few_steps),
            "vae": helper("vae"),
        }
        for encoder, config in architecture.text_encoders.items():
            parts[encoder] = helper(encoder)
            parts[TOKENIZERS[encoder]] = components.tokenizer(config, files, TOKENIZERS[encoder])
        with library_errors(files.path):  # the constructor of a pipeline corrects outdated configs of its components
            cls.pipelines["text2image"](**parts, **cls.unused_components)
        weights_hash = fingerprint(files, ("unet", *architecture.text_encoders), parts["scheduler"].config.prediction_type)
        return cls(architecture, parts, name, revision, weights_hash, runtime, helper)

    def offload_encoders(self) -> None:
        idle = self.runtime.memory.idle
        for name, helper in self._helpers.items():
            if helper is not None and idle == "offload":
                self._move(helper, torch.device("cpu"))
            elif idle == "release":
                self._helpers[name] = None
        self._move(self._unet)

    def _move(self, module: Any, device: torch.device | None = None) -> None:
        """Moves a module to a device, by default the runtime's. A move that an exception has interrupted is completed by the next one.

        Unless ``idle`` is ``keep``, each module is moved when it is first used: the U-Net follows after photo and prompt are encoded.
        """
        device = device or self.runtime.device
        if module in self._half_moved or next(module.parameters()).device != device:
            self._half_moved.add(module)
            module.to(device)
            self._half_moved.discard(module)

    def _on_device(self, name: str) -> Any:
        """The VAE or a text encoder: read again if it was released, frozen, on the device, with the VAE's memory levers applied."""
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
        ids, mask = self._tokenized("tokenizer", prompt)
        mask = mask if self.architecture.text_encoder.get("use_attention_mask") else None  # as the pipelines of Stable Diffusion 1 and 2
        return Conditioning(self._on_device("text_encoder")(ids, attention_mask=mask)[0].float())

    def _tokenized(self, name: str, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids of a prompt and the mask of its padding, ``[1, T]`` int64, padded or truncated to the maximum length ``T``.

        Warns with the text that was cut off if the prompt is longer than ``T - 2`` tokens: two are the start and the end token.
        """
        tokenizer = self._tokenizers[name]
        limit, all_ids = tokenizer.model_max_length, tokenizer(prompt).input_ids
        if len(all_ids) > limit:
            removed = tokenizer.decode(all_ids[limit - 1 : -1])
            message = f"the prompt is longer than the {limit - 2} tokens that this base encodes; the end is cut off: {removed!r}"
            warnings.warn(message, ImagicWarning, stacklevel=4)
        found = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").to(self.runtime.device)
        return found.input_ids, found.attention_mask

    def null(self) -> Conditioning | None:
        return None if self.architecture.embeds_guidance else self.encode_prompt("")

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        if not self.architecture.embeds_guidance:
            return conditioning
        guidance = torch.full((1,), guidance_scale, device=conditioning.tokens.device)
        return replace(conditioning, extra={**conditioning.extra, "guidance": guidance})

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the U-Net for the added conditions.

        Args:
            conditioning: with added conditions, of the batch size of the call.
        """
        if not self.architecture.embeds_guidance:
            return {}
        guidance_scale, channels = conditioning.extra["guidance"], self.architecture.unet["time_cond_proj_dim"]
        # guidance embedding of latent consistency models (arXiv 2310.04378), with the conventions of diffusers' pipelines
        embedding = get_timestep_embedding((guidance_scale - 1) * 1000, channels, downscale_freq_shift=1)
        return {"timestep_cond": embedding.to(conditioning.tokens.dtype)}

    def pipeline_kwargs(self, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        return {"prompt_embeds": conditioning.tokens, "negative_prompt_embeds": None if null is None else null.tokens}

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
        dtype = self._unet.dtype
        conditioning = conditioning.expand(len(x_t)).to(x_t.device, dtype)
        mixed = dtype == torch.float32 and self.runtime.dtype != torch.float32
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=mixed, cache_enabled=self.runtime.memory.autocast_cache):
            return self._unet(x_t.to(dtype), timesteps, conditioning.tokens, **self.added_conditions(conditioning)).sample

    def lora_targets(self, preset: str) -> list[str]:
        return list(LORA_TARGETS[preset])

    def scheduler(self, scheduler_class: type | None = None) -> Any:
        return schedulers.converted(self._scheduler, scheduler_class) if scheduler_class else schedulers.copied(self._scheduler)

    def sampler(self, name: Scheduler, karras_sigmas: bool) -> Any:
        return schedulers.sampler(self._scheduler, name, karras_sigmas)

    def pipeline(self, kind: PipelineKind, scheduler_class: type | None = None) -> Any:
        self._move(self._unet)
        pipe = self.pipelines[kind](
            vae=self._on_device("vae"),
            **dict.fromkeys(self.architecture.text_encoders),  # None: a pipeline with text encoders would run on their device
            **self._tokenizers,
            unet=self._unet,
            scheduler=self.scheduler(scheduler_class),
            **self.unused_components,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def vae_dtype(architecture: Architecture, dtype: torch.dtype) -> torch.dtype:
    """Precision of the VAE: ``dtype``, but fp32 instead of fp16 for a VAE that overflows in fp16 and would decode to black images."""
    return torch.float32 if architecture.vae_overflows_fp16 and dtype == torch.float16 else dtype
