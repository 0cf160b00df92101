"""Scores: how well a picture fits a text, and how near it is to another picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import CLIPModel, CLIPTokenizer

from .bases.registry import CRITTERS
from .images import to_pixels


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.cat([to_pixels(image) for image in images])


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB."""
    return peak_signal_noise_ratio(pixels([image]), pixels([reference]), data_range=2.0).item()


class CritterAlignment:
    """How well pictures of the procedural world fit texts, by a CLIP trained on that world alone."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def load(cls) -> Self:
        """The CLIP that ships with the package."""
        return cls(CLIPModel.from_pretrained(CRITTERS / "clip", dtype=torch.float32), CLIPTokenizer.from_pretrained(CRITTERS / "tokenizer"))

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Cosine similarity of every picture with every text, ``[images, texts]``."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = self.clip(input_ids=ids, pixel_values=pixels(images))
        return output.image_embeds @ output.text_embeds.T
