"""Scores of images by other models: CLIP and DINOv2, from a folder, from the cache of the hub, or from the hub. They run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ...core.errors import ImagicError

Metric = Callable[[Image.Image], dict[str, float]]
"""Scores an image: values by name."""


def clip_metric(source: str, offline: bool, photo: Image.Image, prompt: str, source_prompt: str | None) -> Metric:
    """Loads a CLIP model (arXiv 2103.00020) and returns a metric by it.

    ``clip`` is the cosine similarity of the image with the target prompt, as in the paper of Imagic. ``clip_direction`` is that of the
    change of the image with the change of the prompt, ``cos(E(image) - E(photo), E(target) - E(source))`` (arXiv 2108.00946); only with a
    source prompt.

    Args:
        source: folder or hub id of the model.
        offline: whether only the cache of the hub is used.
        photo: the photo.
        prompt: the target prompt.
        source_prompt: a caption of the photo, or None.

    Raises:
        ImagicError: the model is not there, or is no CLIP model.
    """
    clip = Clip.load("--clip", source, offline)
    target, before = clip.text(prompt), clip.image(photo)
    direction = None if source_prompt is None else target - clip.text(source_prompt)

    def score(image: Image.Image) -> dict[str, float]:
        seen = clip.image(image)
        found = {"clip": (seen @ target).item()}
        if direction is not None:
            found["clip_direction"] = F.cosine_similarity(seen - before, direction, dim=0).item()
        return found

    return score


def dino_metric(source: str, offline: bool, photo: Image.Image) -> Metric:
    """Loads a DINOv2 model (arXiv 2304.07193) and returns a metric by it: ``dino``, the cosine similarity of an image with the photo.

    Args:
        source, offline, photo: as for :func:`clip_metric`.

    Raises:
        ImagicError: the model is not there, or is no DINOv2 model.
    """
    model = VisionModel.load("--dino", source, "dinov2", offline)

    def look(image: Image.Image) -> Tensor:
        return model.features(image, lambda pixels: model.network(pixels).pooler_output)

    before = look(photo)
    return lambda image: {"dino": (look(image) @ before).item()}


def model_options(offline: bool) -> dict[str, Any]:
    """Options of the loaders of transformers, for a model in fp32 from safetensors files.

    Args:
        offline: whether only the cache of the hub is used. The loaders look for a PEFT adapter of the model first, and ask the hub for it
            unless that is said apart.
    """
    local = {"local_files_only": offline}
    return {**local, "adapter_kwargs": local, "use_safetensors": True, "dtype": torch.float32}


def measured(metrics: Sequence[Metric], image: Image.Image) -> dict[str, float]:
    """Returns the scores of an image by several metrics."""
    return {name: value for metric in metrics for name, value in metric(image).items()}


@dataclass(frozen=True)
class VisionModel:
    """A vision model in fp32 with its image processor.

    Args:
        network: the model of transformers.
        processor: its image processor.
    """

    network: Any
    processor: Any

    @classmethod
    def load(cls, flag: str, source: str, kind: str, offline: bool) -> VisionModel:
        """Loads a model from safetensors files.

        Args:
            flag: what named it, for messages.
            source: folder or hub id.
            kind: its ``model_type``.
            offline: whether only the cache of the hub is used.

        Raises:
            ImagicError: the model is not there, or is of another kind.
        """
        with explained(flag, source, kind, offline):
            network: Any = AutoModel.from_pretrained(source, **model_options(offline))
            if network.config.model_type != kind:
                raise ValueError(f"its model_type is {network.config.model_type}")
            return cls(network.eval(), AutoImageProcessor.from_pretrained(source, local_files_only=offline))

    @torch.no_grad()
    def features(self, image: Image.Image, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the normalised features of an image, ``[D]``."""
        pixels = self.processor(images=image, return_tensors="pt").pixel_values
        return F.normalize(network(pixels.to(self.network.device))[0], dim=-1)


@dataclass(frozen=True)
class Clip:
    """A CLIP model (arXiv 2103.00020): normalised embeddings of images and texts.

    Args:
        model: the model with its image processor.
        tokenizer: its tokenizer.
    """

    model: VisionModel
    tokenizer: Any

    @classmethod
    def load(cls, flag: str, source: str, offline: bool) -> Clip:
        """Loads a model; arguments and errors as those of :meth:`VisionModel.load`."""
        model = VisionModel.load(flag, source, "clip", offline)
        with explained(flag, source, "clip", offline):
            return cls(model, AutoTokenizer.from_pretrained(source, local_files_only=offline))

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """Returns the embedding of a text, ``[D]``; what is longer than the model reads is cut."""
        network = self.model.network
        ids = self.tokenizer([text], truncation=True, return_tensors="pt").to(network.device)
        return F.normalize(network.get_text_features(**ids).pooler_output[0], dim=-1)

    def image(self, image: Image.Image) -> Tensor:
        """Returns the embedding of an image, ``[D]``."""
        return self.model.features(image, lambda pixels: self.model.network.get_image_features(pixels).pooler_output)


@contextmanager
def offline_hub(offline: bool) -> Iterator[None]:
    """Keeps huggingface_hub off the network inside the context, if asked to.

    ``local_files_only`` does not: the hub is asked which agents there are, for the name of the client in requests that are not made.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def explained(flag: str, source: str, kind: str, offline: bool) -> Iterator[None]:
    """Converts errors of transformers and the hub while a model is loaded into ImagicError, and keeps them off the network if offline."""
    try:
        with offline_hub(offline):
            yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        expected = f"a folder or a hub id of a {kind} model of transformers, in safetensors"
        remedy = (
            "leave out --offline to download it, or name a folder" if offline else "check the name and the connection, or name a folder"
        )
        raise ImagicError(f"{flag} {source} cannot be loaded ({reason})", expected, remedy) from error
