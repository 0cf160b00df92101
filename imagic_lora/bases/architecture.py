"""The configs of a base's components. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .loading.vetting import TIME_IDS


@dataclass(frozen=True)
class Architecture:
    """The configs of a base's components, with the keys of diffusers and transformers.

    Args:
        unet: config of the U-Net.
        vae: config of the VAE.
        text_encoder: config of the (first) text encoder.
        scheduler: config of the sampling scheduler; ``_class_name`` is its class.
        text_encoder_2: config of the second text encoder, whose pooled embedding is an input of the U-Net; None for families without one.
        empty_is_zeros: True if the unconditional embedding is zeros, False if it is the embedding of the empty prompt.
        few_steps: number of sampling steps of a distilled base; None for other bases.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder_2: dict[str, Any] | None = None
    empty_is_zeros: bool = False
    few_steps: int | None = None

    @property
    def text_encoders(self) -> dict[str, dict[str, Any]]:
        """Configs of the text encoders by component name (``text_encoder``, ``text_encoder_2``)."""
        return {"text_encoder": self.text_encoder} | ({"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {})

    @property
    def vae_scale_factor(self) -> int:
        """Downsampling factor of the VAE: side of an image in pixels divided by the side of its latents."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one conditioning with added conditions, ``B = 1``, by name."""
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, self.text_encoder["max_position_embeddings"], self.unet["cross_attention_dim"])}
        if self.text_encoder_2:
            shapes |= {"pooled": (1, self.text_encoder_2["projection_dim"]), "time_ids": (1, TIME_IDS)}
        return shapes | ({"guidance": (1,)} if self.embeds_guidance else {})

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser, which then needs no unconditional pass."""
        return bool(self.unet.get("time_cond_proj_dim"))

    @property
    def vae_overflows_fp16(self) -> bool:
        """Whether the VAE overflows in fp16: the VAE of SDXL does, unless its config sets ``force_upcast`` to false."""
        return self.text_encoder_2 is not None and self.vae.get("force_upcast", True)

    @property
    def resolution(self) -> int:
        """Side of the square images that the base was trained on, in pixels."""
        return self.unet["sample_size"] * self.vae_scale_factor
