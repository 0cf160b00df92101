"""The configs of a base's components. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .loading.vetting import TIME_IDS


@dataclass(frozen=True)
class Architecture:
    """The configs of a base's components, in diffusers' and transformers' own words.

    Args:
        text_encoder_2: of families that have a second one, whose pooled embedding the U-Net is told as well.
        empty_is_zeros: the unconditional embedding is zeros, and not that of the empty sentence.
        few_steps: of a distilled base, how many steps it samples in.
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
        """The configs of the text encoders by the names of their folders."""
        return {"text_encoder": self.text_encoder} | ({"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {})

    @property
    def factor(self) -> int:
        """Pixels of a picture's side to one of its latents."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one conditioning, by name."""
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, self.text_encoder["max_position_embeddings"], self.unet["cross_attention_dim"])}
        if self.text_encoder_2:
            shapes |= {"pooled": (1, self.text_encoder_2["projection_dim"]), "time_ids": (1, TIME_IDS)}
        return shapes | ({"guidance": (1,)} if self.embeds_guidance else {})

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser, so that pictures are guided without an unconditional pass."""
        return bool(self.unet.get("time_cond_proj_dim"))

    @property
    def wide_vae(self) -> bool:
        """Whether the VAE overflows in fp16, as that of SDXL does unless its config says that it was mended."""
        return self.text_encoder_2 is not None and self.vae.get("force_upcast", True)

    @property
    def resolution(self) -> int:
        """Side of the square pictures the base was made for, in pixels."""
        return self.unet["sample_size"] * self.factor
