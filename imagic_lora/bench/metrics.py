"""Scores: how well a picture fits a text, and how near it is to another picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from transformers import CLIPModel, CLIPTokenizer

from ..bases.loading.known import CRITTERS
from ..photos.canvas import to_pixels


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.cat([to_pixels(image) for image in images])


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB."""
    return peak_signal_noise_ratio(pixels([image]), pixels([reference]), data_range=2.0).item()


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of two pictures of one size, at most 1 (Wang et al. 2004)."""
    ours, theirs = (pixels([one]) / 2 + 0.5 for one in (image, reference))
    value = structural_similarity_index_measure(ours, theirs, data_range=1.0)
    assert isinstance(value, Tensor)
    return value.item()


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

    @torch.no_grad()
    def likeness(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Cosine similarity of every picture with every reference in the image tower, ``[images, references]``."""
        ours, theirs = (self._embedded(some) for some in (images, references))
        return ours @ theirs.T

    def _embedded(self, images: Sequence[Image.Image]) -> Tensor:
        found: Any = self.clip.get_image_features(pixels(images))
        return F.normalize(found.pooler_output, dim=-1)

    def best(self, images: Sequence[Image.Image], text: str, photo: Image.Image) -> int:
        """Which of the pictures is most like both the text and the photo: the greatest sum of the two cosines."""
        return int((self.scores(images, [text]) + self.likeness(images, [photo])).argmax())
