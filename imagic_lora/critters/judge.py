"""The judge: a small network that predicts the scene of an image. It is used only for scores.

It is independent of the base and of the CLIP model: it has its own weights and its own training, and uses no captions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scene import ATTRIBUTES, IDENTITY, RANGES, Scene

WEIGHTS = Path(__file__).parent / "data" / "judge.safetensors"
FACINGS = (-1, 1)
_MIDDLE = {name: (low + high) / 2 for name, (low, high) in RANGES.items()}


@dataclass(frozen=True)
class Reading:
    """The judge's prediction for one image.

    Args:
        attributes: the most likely value of each of the five attributes.
        facing: 1 if the animal looks right, -1 if it looks left.
        identity: the estimate of every factor of :data:`~imagic_lora.critters.scene.IDENTITY`, in the units of the scene.
    """

    attributes: dict[str, str]
    facing: int
    identity: dict[str, float]

    def deviations(self, scene: Scene) -> dict[str, float]:
        """The difference of each identity factor to that of a scene, in standard deviations over all scenes."""
        return {name: (self.identity[name] - getattr(scene, name)) / spread for name, spread in IDENTITY.items()}

    def distance(self, scene: Scene) -> float:
        """The root mean square of :meth:`deviations`; infinite if the animal faces the other way."""
        if self.facing != scene.facing:
            return math.inf
        return math.sqrt(sum(value * value for value in self.deviations(scene).values()) / len(IDENTITY))

    def changed(self, scene: Scene) -> list[str]:
        """Names of the attributes that differ from those of a scene."""
        return [name for name, value in self.attributes.items() if value != getattr(scene, name)]


def identity_targets(scene: Scene) -> list[float]:
    """The training target of the judge: each identity factor minus the middle of its range, divided by its standard deviation."""
    return [(getattr(scene, name) - middle) / IDENTITY[name] for name, middle in _MIDDLE.items()]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


class Judge(nn.Module):
    """Five convolutions of stride 2, then a linear head for each attribute, one for the facing and one for the identity."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128, 160)
        self.features = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)), nn.Flatten())
        sizes = {**{name: len(values) for name, values in ATTRIBUTES.items()}, "facing": len(FACINGS), "identity": len(IDENTITY)}
        self.heads = nn.ModuleDict({name: nn.Linear(160 * 4, size) for name, size in sizes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predicts the scenes of a batch.

        Args:
            images: ``[B, 3, 64, 64]`` in [-1, 1].

        Returns:
            Logits ``[B, values]`` by attribute and for ``facing``, and ``identity``, ``[B, factors]``, in the units of
            :func:`identity_targets`.
        """
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read_scenes(self, images: Tensor) -> list[Reading]:
        """Predicts the scene of each image; ``images`` as in :meth:`forward`."""
        outputs = self(images)
        best = {name: outputs[name].argmax(1).tolist() for name in (*ATTRIBUTES, "facing")}
        identity = outputs["identity"].double().tolist()
        return [
            Reading(
                {name: values[best[name][k]] for name, values in ATTRIBUTES.items()},
                FACINGS[best["facing"][k]],
                {name: _MIDDLE[name] + value * IDENTITY[name] for name, value in zip(IDENTITY, identity[k], strict=True)},
            )
            for k in range(len(images))
        ]

    def save(self, path: Path) -> None:
        """Writes the weights to a safetensors file, in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """Loads a judge, by default the one in the package, and sets it to evaluation mode."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()
