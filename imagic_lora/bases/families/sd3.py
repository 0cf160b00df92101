"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a rectified-flow transformer, two CLIP text encoders and T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad

from ...core.conditioning import Conditioning
from ...core.errors import ImagicError
from ..architecture import SD3_T5_LENGTH, Architecture
from ..base import PipelineKind
from ..loading.components import tokenizer_of
from ..process import Flow
from .common import LatentBase
from .flows import FlowBase

_T5 = "text_encoder_3"


class StableDiffusion3(FlowBase):
    """A Stable Diffusion 3 base. T5 may be missing: the tokens that it would give are zeros, as in diffusers' pipeline.

    The tokens are those of the CLIP encoders, concatenated along their channels and padded with zeros to the width of T5, then those of T5.
    """

    process: Flow
    denoiser_class = SD3Transformer2DModel
    pipelines: ClassVar[dict[PipelineKind, Any]] = {"text2image": StableDiffusion3Pipeline}
    optional_components: ClassVar[tuple[str, ...]] = (_T5, tokenizer_of(_T5))

    @classmethod
    def process_of(cls, architecture: Architecture, scheduler: Any) -> Flow:
        return Flow(scheduler.config.shift, scheduler.config.num_train_timesteps)

    def encode(self, prompt: str) -> Conditioning:
        tokens, pooled, has_t5 = [], [], _T5 in self.architecture.text_encoders
        for encoder in ("text_encoder", "text_encoder_2"):
            ids = self._tokenized(tokenizer_of(encoder), prompt, "the CLIP text encoders of this base read" if has_t5 else None)[0]
            output = self._on_device(encoder)(ids, output_hidden_states=True)
            tokens.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip, width = torch.cat(tokens, dim=-1).float(), self.architecture.denoiser["joint_attention_dim"]
        if has_t5:
            self._make_room(_T5)
            t5 = self._on_device(_T5)(self._tokenized(tokenizer_of(_T5), prompt)[0])[0].float()
        else:
            t5 = clip.new_zeros(1, SD3_T5_LENGTH, width)
        return Conditioning(torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1), torch.cat(pooled, dim=-1).float())

    def word_mask(self, prompt: str) -> Tensor:
        masks = [self._tokenized("tokenizer", prompt)[1]]
        if _T5 in self.architecture.text_encoders:
            masks.append(self._tokenized(tokenizer_of(_T5), prompt)[1])
        else:
            masks.append(masks[0].new_zeros(1, SD3_T5_LENGTH))
        return torch.cat(masks, dim=1).bool()

    def null(self) -> Conditioning | None:
        return self.encode_prompt("")

    def encode_image(self, image: Tensor) -> Tensor:
        config = self.architecture.denoiser
        most = config["pos_embed_max_size"] * config["patch_size"] * self.architecture.vae_scale_factor
        if max(image.shape[2:]) > most:
            got = f"an image of {image.shape[3]}x{image.shape[2]} pixels"
            raise ImagicError(got, f"at most {most} pixels a side, the positions of the transformer", "use a lower --resolution")
        return super().encode_image(image)

    def denoise(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        levels = timesteps * self.process.trained
        return self._denoiser(x_t, conditioning.tokens, conditioning.pooled, levels).sample


class StableDiffusion3Clip(StableDiffusion3):
    """The transformer of Stable Diffusion 3 with one CLIP text encoder: last states and pooled state are tokens and pooled embedding.

    diffusers' pipeline takes them as ``prompt_embeds`` and ``pooled_prompt_embeds``: it encodes prompts with two CLIP encoders only.
    """

    optional_components: ClassVar[tuple[str, ...]] = ("text_encoder_2", "tokenizer_2", _T5, tokenizer_of(_T5))

    def encode(self, prompt: str) -> Conditioning:
        output = self._on_device("text_encoder")(self._tokenized("tokenizer", prompt)[0])
        return Conditioning(output.last_hidden_state.float(), output.pooler_output.float())

    def word_mask(self, prompt: str) -> Tensor:
        return LatentBase.word_mask(self, prompt)
