"""Metrics: the agreement of an image with a prompt, and the similarity of two images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import CLIPModel, CLIPTokenizer

from ..bases.loading.known import CRITTERS
from ..photos.canvas import to_pixels


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Returns images of equal size as a tensor ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.cat([to_pixels(image) for image in images])


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Returns the peak signal-to-noise ratio of two images of equal size, in dB."""
    return peak_signal_noise_ratio(pixels([image]), pixels([reference]), data_range=2.0).item()


class CritterAlignment:
    """Similarity of critter images to prompts and to each other, by a CLIP that is trained on critter images only.

    Args:
        clip: the CLIP model.
        tokenizer: its tokenizer.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def load(cls, folder: Path = CRITTERS) -> Self:
        """Loads the CLIP model of an embedded base, by default the one in the package."""
        return cls(CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32), CLIPTokenizer.from_pretrained(folder / "tokenizer"))

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Returns the cosine similarity of every image with every text, ``[images, texts]``, in [-1, 1]."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = self.clip(input_ids=ids, pixel_values=pixels(images))
        return output.image_embeds @ output.text_embeds.T

    @torch.no_grad()
    def likeness(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Returns the cosine similarity of the CLIP embeddings of images and references, ``[images, references]``, in [-1, 1]."""
        return self._embedded(images) @ self._embedded(references).T

    def _embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the normalised CLIP embeddings of images, ``[B, D]``."""
        output: Any = self.clip.get_image_features(pixels(images))
        return F.normalize(output.pooler_output, dim=-1)
