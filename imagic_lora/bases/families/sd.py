"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net, and the prediction type of the scheduler's config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.config import Scheduler
from ..architecture import Architecture, check_text_to_image
from ..base import PipelineKind
from ..loading import schedulers
from ..process import Diffusion
from .common import LatentBase

MASKED_PHOTO = "masked_photo"
"""Added condition of an inpainting model: the mask, and the latents of the photo without the masked area, ``[1, 1 + C, h, w]``."""


class StableDiffusion(LatentBase):
    """A Stable Diffusion base. Arguments as for :class:`~imagic_lora.bases.families.common.LatentBase`."""

    process: Diffusion
    denoiser_class = UNet2DConditionModel
    pipelines: ClassVar[dict[PipelineKind, Any]] = {
        "text2image": StableDiffusionPipeline,
        "image2image": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
    }
    unused_components: ClassVar[dict[str, Any]] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @classmethod
    def process_of(cls, architecture: Architecture, scheduler: Any) -> Diffusion:
        trained = schedulers.distilled_timesteps(scheduler, architecture.few_steps)
        return Diffusion(schedulers.training_scheduler(scheduler), trained)

    @property
    def training_scheduler(self) -> Any:
        """DDPMScheduler with the noise schedule of training."""
        return self.process.scheduler

    def encode(self, prompt: str) -> Conditioning:
        ids, mask = self._tokenized("tokenizer", prompt)
        mask = (
            mask if self.architecture.text_encoders["text_encoder"].get("use_attention_mask") else None
        )  # as the pipelines of Stable Diffusion 1 and 2
        return Conditioning(self._on_device("text_encoder")(ids, attention_mask=mask)[0].float())

    def null(self) -> Conditioning | None:
        return None if self.architecture.guidance == "embedded" else self.encode_prompt("")

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        if self.architecture.guidance != "embedded":
            return conditioning
        guidance = torch.full((1,), guidance_scale, device=conditioning.tokens.device)
        return replace(conditioning, extra={**conditioning.extra, "guidance": guidance})

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the U-Net for the added conditions.

        Args:
            conditioning: with added conditions, of the batch size of the call.
        """
        if self.architecture.guidance != "embedded":
            return {}
        guidance_scale, channels = conditioning.extra["guidance"], self.architecture.denoiser["time_cond_proj_dim"]
        # guidance embedding of latent consistency models (arXiv 2310.04378), with the conventions of diffusers' pipelines
        embedding = get_timestep_embedding((guidance_scale - 1) * 1000, channels, downscale_freq_shift=1)
        return {"timestep_cond": embedding.to(conditioning.tokens.dtype)}

    def pipeline_kwargs(self, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        return {"prompt_embeds": conditioning.tokens, "negative_prompt_embeds": None if null is None else null.tokens}

    def with_masked_photo(self, conditioning: Conditioning, mask: Tensor, masked: Tensor) -> Conditioning:
        if not self.architecture.inpaints:
            return super().with_masked_photo(conditioning, mask, masked)
        inputs = torch.cat([mask, masked], dim=1).to(conditioning.tokens)
        return replace(conditioning, extra={**conditioning.extra, MASKED_PHOTO: inputs})

    def denoise(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if self.architecture.inpaints:
            if MASKED_PHOTO not in conditioning.extra:
                check_text_to_image(self.architecture, self.name, "a prediction without a mask")
            x_t = torch.cat([x_t, conditioning.extra[MASKED_PHOTO]], dim=1)
        return self._denoiser(x_t, timesteps, conditioning.tokens, **self.added_conditions(conditioning)).sample

    def scheduler(self, scheduler_class: type | None = None) -> Any:
        return schedulers.converted(self._scheduler, scheduler_class) if scheduler_class else schedulers.copied(self._scheduler)

    def sampler(self, name: Scheduler, karras_sigmas: bool) -> Any:
        return schedulers.sampler(self._scheduler, name, karras_sigmas)

    def pipeline(self, kind: PipelineKind, scheduler_class: type | None = None) -> Any:
        if kind != "inpaint":
            check_text_to_image(self.architecture, self.name, f"the pipeline {self.pipelines[kind].__name__}")
        self._move(self._denoiser)
        pipe = self.pipelines[kind](
            vae=self._on_device("vae"),
            **dict.fromkeys(self.architecture.text_encoders),  # None: a pipeline with text encoders would run on their device
            **self._tokenizers,
            unet=self._denoiser,
            scheduler=self.scheduler(scheduler_class),
            **self.unused_components,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
