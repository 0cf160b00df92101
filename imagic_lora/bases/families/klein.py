"""FLUX.2 klein (Black Forest Labs, 2026): a rectified-flow transformer with three layers of Qwen3 as its text encoder."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ...core.conditioning import Conditioning
from ...core.errors import ImagicWarning
from ..architecture import KLEIN_LAYERS, Architecture
from ..base import REFERENCE, PipelineKind
from ..process import Flow
from ..tokens import Token
from .flows import FlowBase

_MESSAGE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # Qwen3's chat template without thinking
_REFERENCE_TIME = 10  # first coordinate of the positions of a reference image; that of the image is 0


class KleinFlow(Flow):
    """The process of FLUX.2 klein: trained on evenly spaced levels, sampled at levels that depend on image size and number of steps.

    Args:
        shift, trained: as in :class:`~imagic_lora.bases.process.Flow`; the shift of a scheduler without dynamic shifting.
        dynamic: whether the scheduler has dynamic shifting, as the published ones have.
    """

    def __init__(self, shift: float, trained: int, dynamic: bool) -> None:
        super().__init__(1.0 if dynamic else shift, trained)
        self.dynamic = dynamic

    def sigmas(self, steps: int, positions: int) -> Tensor:
        """As Flux2KleinPipeline has them: evenly spaced from 1 to ``1 / steps``, shifted by ``exp(mu)``, then 0."""
        sampled = Flow(math.exp(_mu(steps, positions)) if self.dynamic else self.shift)
        times = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
        return torch.cat([sampled.shifted(times), times.new_zeros(1)]).float()


def _mu(steps: int, positions: int) -> float:
    """The logarithm of the shift: linear in the positions at 10 and at 200 steps, and between these linear in the steps.

    Above 4300 positions it does not depend on the steps. The numbers are those of Black Forest Labs.
    """
    at_200 = 0.00016927 * positions + 0.45666666
    at_10 = 8.73809524e-05 * positions + 1.89833333
    return at_200 if positions > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)


class Flux2Klein(FlowBase):
    """A FLUX.2 klein base. Latents ``[B, 4 C, h / 2, w / 2]`` are patches of 2 x 2 of those of the VAE, normalised by its batch norm.

    All 512 tokens take part in the attention of the transformer, padding too.
    """

    process: KleinFlow
    denoiser_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    pipelines: ClassVar[dict[PipelineKind, Any]] = {"text2image": Flux2KleinPipeline}

    @classmethod
    def process_of(cls, architecture: Architecture, scheduler: Any) -> KleinFlow:
        config = scheduler.config
        return KleinFlow(config.shift, config.num_train_timesteps, config.use_dynamic_shifting)

    def _tokenized(self, name: str, prompt: str, reader: str | None = None) -> tuple[Tensor, Tensor]:
        tokenizer = self._tokenizers[name]
        text, limit = _MESSAGE.format(prompt), tokenizer.model_max_length
        ids, added = tokenizer(text, verbose=False).input_ids, len(tokenizer(_MESSAGE.format("")).input_ids)
        if len(ids) > limit:
            removed = tokenizer.decode(ids[limit:]).removesuffix(_MESSAGE.partition("{}")[2])
            message = f"the prompt is longer than the {limit - added} tokens that this base encodes; the end is cut off: {removed!r}"
            warnings.warn(message, ImagicWarning, stacklevel=4)
        found = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").to(self.runtime.device)
        return found.input_ids, found.attention_mask

    def tokenize(self, prompt: str) -> list[Token]:
        tokenizer, before = self._tokenizers["tokenizer"], _MESSAGE.index("{}")
        text, limit = _MESSAGE.format(prompt), tokenizer.model_max_length
        encoded = tokenizer(text, max_length=limit, truncation=True, return_offsets_mapping=True)
        inside = [tuple(min(max(place - before, 0), len(prompt)) for place in span) for span in encoded.offset_mapping]
        return [Token(number, *span) for number, span in zip(encoded.input_ids, inside, strict=True)]

    def encode(self, prompt: str) -> Conditioning:
        ids, mask = self._tokenized("tokenizer", prompt)
        self._make_room("text_encoder")
        states = self._on_device("text_encoder")(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return Conditioning(torch.cat([states[layer] for layer in KLEIN_LAYERS], dim=-1).float())

    def null(self) -> Conditioning | None:
        return None if self.architecture.guidance == "none" else self.encode_prompt("")

    def normalized(self, vae: Any, encoded: Tensor) -> Tensor:
        mean, std = _statistics(vae, encoded)
        return (pixel_unshuffle(encoded, 2) - mean) / std

    def denormalized(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return pixel_shuffle(latents * std + mean, 2)

    def denoise(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        batch, channels, height, width = x_t.shape
        images, positions = [x_t], [_positions(x_t, 0)]
        if (reference := conditioning.extra.get(REFERENCE)) is not None:
            images.append(reference.to(x_t.dtype))
            positions.append(_positions(reference, _REFERENCE_TIME))
        length = conditioning.tokens.shape[1]
        text_positions = torch.zeros(length, 4, device=x_t.device)
        text_positions[:, 3] = torch.arange(length)
        velocity = self._denoiser(
            torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),
            encoder_hidden_states=conditioning.tokens,
            timestep=timesteps,
            img_ids=torch.cat(positions),
            txt_ids=text_positions,
        ).sample
        return velocity[:, : height * width].transpose(1, 2).reshape(batch, channels, height, width)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents in patches, ``[1, C, 1, 1]``, which the VAE stores as the state of a batch norm."""
    mean, variance = (value.view(1, -1, 1, 1).to(like) for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def _positions(latents: Tensor, time: int) -> Tensor:
    """The coordinates of the tokens of an image, ``[h * w, 4]``: the time, row, column, and 0."""
    rows, columns = (torch.arange(size, device=latents.device) for size in latents.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.nn.functional.pad(grid, (1, 1)) + torch.tensor([time, 0, 0, 0], device=latents.device)
