"""The evaluator: a source, an edited picture and prompts in, the measures out. All of its models run in fp32."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...core.errors import ImagicError
from ...sampling.sweeps.metrics import Clip
from .lpips import Lpips, load_lpips
from .measures import Measure, measures
from .regions import pixel_measures
from .sources import CLIPS, LPIPS, PIXELS, Sources, identity
from .structure import Structure

PUBLISHED_QUALITY = 75
"""Quality of the JPEG files that PIE-Bench's own code writes its edits to."""


@dataclass(frozen=True)
class Settings:
    """What the scores depend on besides the pictures.

    Args:
        sources: the metrics, and where their models come from.
        size: side of the square that pictures are scaled to, in pixels.
        as_published: whether the quirks of PIE-Bench's evaluator are reproduced.
        device: where the models run, as torch names it.
    """

    sources: Sources
    size: int = 512
    as_published: bool = False
    device: str = "cpu"

    def measures(self) -> list[Measure]:
        """Returns the measures, those of a whole picture first."""
        return measures(self.sources, self.size, self.as_published)


@dataclass(frozen=True)
class Subject:
    """What is scored.

    Args:
        source: the photo, RGB.
        edited: the edited picture, RGB, of any size.
        prompt: the target prompt.
        source_prompt: a caption of the photo.
        mask: the region of the edit, mode L, of the size of the source; 128 and above is inside.
        lossy: whether the edited picture comes from a JPEG file.
    """

    source: Image.Image
    edited: Image.Image
    prompt: str
    source_prompt: str | None = None
    mask: Image.Image | None = None
    lossy: bool = False


@dataclass
class Evaluator:
    """Scores edited pictures.

    Args:
        settings: the metrics, and how pictures are treated.

    Attributes:
        weights: what tells the weights of each model from others, by its name.
    """

    settings: Settings
    weights: dict[str, str] = field(default_factory=dict)
    _clips: dict[str, Clip] = field(default_factory=dict)
    _lpips: dict[str, Lpips] = field(default_factory=dict)
    _structure: Structure | None = None

    @classmethod
    def load(cls, settings: Settings) -> Evaluator:
        """Loads the models.

        Raises:
            ImagicError: one is not there, or is of another kind; the message says how to leave it out.
        """
        evaluator = cls(settings)
        for model in settings.sources.models():
            try:
                evaluator._load(model)
            except ImagicError as error:
                remedy = error.remedy if "--metrics" in error.remedy else f"{error.remedy}; or leave {model} out of --metrics"
                raise ImagicError(error.got, error.expected, remedy) from error
        return evaluator

    def _load(self, model: str) -> None:
        sources, device = self.settings.sources, self.settings.device
        source = sources.of(model)
        if model in LPIPS:
            network, self.weights[model] = load_lpips(model, source, sources.offline)
            self._lpips[model] = network.to(device)
            return
        assert source is not None
        if model in CLIPS:
            self._clips[model] = Clip.load(f"--model {model}:", source, sources.offline)
            loaded = self._clips[model].model.network
        else:
            self._structure = Structure.load(source, sources.offline)
            loaded = self._structure.network
        self.weights[model] = identity(source, loaded)
        loaded.to(device)

    def scores(self, subject: Subject) -> dict[str, float]:
        """Returns the values by the names of the measures. A measure of a region that is empty, or without a mask, is left out.

        Args:
            subject: the pictures, the prompts and the mask.

        Raises:
            ImagicError: a value is not finite.
        """
        edited = subject.edited
        if self.settings.as_published and not subject.lossy:
            edited = _recompressed(edited)
        pair = _Pair.of(subject, edited, self.settings)
        found: dict[str, float] = {}
        if PIXELS in self.settings.sources.metrics:
            for suffix, region in pair.regions():
                values = pixel_measures(pair.edited, pair.source, region, self.settings.as_published)
                found |= {f"{name}{suffix}": value for name, value in values.items()}
        for model, network in self._lpips.items():
            for suffix, region in pair.regions():
                found[f"{model.replace('-', '_')}{suffix}"] = self._perceptual(network, pair, region)
        for model, clip in self._clips.items():
            found |= {f"{model.replace('-', '_')}{suffix}": value for suffix, value in self._aligned(clip, subject, edited, pair).items()}
        if self._structure is not None:
            found["structure"] = self._structure.distance(pair.edited, pair.source, self.settings.as_published)
        for name, value in found.items():
            if not np.isfinite(value):
                raise ImagicError(f"{name} is {value}", "a finite number", "check the weights of its model")
        return found

    def _perceptual(self, network: Lpips, pair: _Pair, region: Tensor | None) -> float:
        if region is None:
            return network.distance(2 * pair.edited - 1, 2 * pair.source - 1)
        first, second = 2 * pair.edited * region - 1, 2 * pair.source * region - 1
        return network.distance(first, second) if self.settings.as_published else network.distance_over(first, second, region)

    def _aligned(self, clip: Clip, subject: Subject, edited: Image.Image, pair: _Pair) -> dict[str, float]:
        """The measures of a CLIP model by what follows its name."""
        target, seen, before = clip.text(subject.prompt), clip.image(edited), clip.image(subject.source)
        found = {"": self._cosine(seen, target), "_image": (seen @ before).item()}
        if subject.source_prompt is not None:
            change = target - clip.text(subject.source_prompt)
            found["_direction"] = cosine_similarity(seen - before, change, dim=0).item()
        inside = pair.inside
        if inside is not None and inside.any():
            cut = (pair.edited * inside * 255).round().byte()[0].permute(1, 2, 0).cpu().numpy()
            found["_edited"] = self._cosine(clip.image(Image.fromarray(cut)), target)
        return found

    def _cosine(self, first: Tensor, second: Tensor) -> float:
        cosine = (first @ second).item()
        return max(cosine, 0.0) if self.settings.as_published else cosine


@dataclass(frozen=True)
class _Pair:
    """Both pictures as tensors ``[1, 3, S, S]`` in [0, 1], and the mask, 1 inside, ``[1, 1, S, S]``."""

    edited: Tensor
    source: Tensor
    inside: Tensor | None

    @classmethod
    def of(cls, subject: Subject, edited: Image.Image, settings: Settings) -> _Pair:
        size = settings.size
        first, second = (_tensor(squared(image, size, Image.Resampling.BICUBIC)).to(settings.device) for image in (edited, subject.source))
        inside = None
        if subject.mask is not None:
            inside = (_tensor(squared(subject.mask, size, Image.Resampling.NEAREST)) >= 128 / 255).float()
            if settings.as_published:
                inside[..., [0, -1], :] = inside[..., [0, -1]] = 1
            inside = inside.to(settings.device)
        return cls(first, second, inside)

    def regions(self) -> list[tuple[str, Tensor | None]]:
        """What follows the name of a measure, and the region; those that are empty are left out."""
        inside = self.inside
        parts = [] if inside is None else [("_background", 1 - inside), ("_edited", inside)]
        return [("", None), *((name, region) for name, region in parts if region.any())]


def squared(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """Returns the square in the centre of a picture, scaled to a side of ``size`` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped if cropped.size == (size, size) else cropped.resize((size, size), resampling)


def _tensor(image: Image.Image) -> Tensor:
    values: Any = np.array(image, dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)[None]


def _recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=PUBLISHED_QUALITY)
    return Image.open(file).convert("RGB")
