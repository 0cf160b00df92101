"""Stable Diffusion XL: two text encoders, a pooled embedding and size ids (arXiv 2307.01952)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

from ...core.conditioning import Conditioning
from ..base import PipelineKind
from ..loading.components import tokenizer_of
from .sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """A Stable Diffusion XL base.

    The size ids (``time_ids``) are original height and width, top and left of the crop, target height and width, in pixels. Original and
    target size are the size of the image, and the crop starts at (0, 0): the defaults of diffusers' pipeline.
    """

    pipelines: ClassVar[dict[PipelineKind, Any]] = {
        "text2image": StableDiffusionXLPipeline,
        "image2image": StableDiffusionXLImg2ImgPipeline,
        "inpaint": StableDiffusionXLInpaintPipeline,
    }
    unused_components: ClassVar[dict[str, Any]] = {"add_watermarker": False}

    def encode(self, prompt: str) -> Conditioning:
        tokens, pooled = [], None
        for encoder in self.architecture.text_encoders:
            output = self._on_device(encoder)(self._tokenized(tokenizer_of(encoder), prompt)[0], output_hidden_states=True)
            tokens.append(output.hidden_states[-2])
            pooled = output[0]  # the projected embedding of the last text encoder
        assert pooled is not None
        return Conditioning(torch.cat(tokens, dim=-1).float(), pooled.float())

    def null(self) -> Conditioning | None:
        empty = super().null()
        if empty is None or empty.pooled is None or not self.architecture.empty_is_zeros:
            return empty
        return Conditioning(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        conditioning = super().with_added_conditions(conditioning, height, width, guidance_scale)
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=conditioning.tokens.device)
        return replace(conditioning, extra={**conditioning.extra, "time_ids": ids})

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.extra["time_ids"].to(conditioning.tokens.dtype)}
        return super().added_conditions(conditioning) | {"added_cond_kwargs": added}

    def pipeline_kwargs(self, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        original_height, original_width, top, left, height, width = (int(value) for value in conditioning.extra["time_ids"][0])
        return super().pipeline_kwargs(conditioning, null) | {
            "pooled_prompt_embeds": conditioning.pooled,
            "negative_pooled_prompt_embeds": None if null is None else null.pooled,
            "original_size": (original_height, original_width),
            "crops_coords_top_left": (top, left),
            "target_size": (height, width),
        }
