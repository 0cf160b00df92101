"""The judge: a small separate network that reads a picture back into its scene, used only to score.

It shares nothing with the base or with the CLIP model: no weights, no training loop of theirs, no captions.
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
    """What the judge sees in one picture.

    Args:
        attributes: the most likely value of each of the five.
        facing: 1 looks right, -1 looks left.
        identity: its estimate of every factor of :data:`IDENTITY`, in the scene's own units.
    """

    attributes: dict[str, str]
    facing: int
    identity: dict[str, float]

    def deviations(self, scene: Scene) -> dict[str, float]:
        """How far each factor of the identity is from a scene's, in standard deviations over scenes."""
        return {name: (self.identity[name] - getattr(scene, name)) / spread for name, spread in IDENTITY.items()}

    def distance(self, scene: Scene) -> float:
        """The root mean square of :meth:`deviations`; infinite where the animal faces the other way."""
        if self.facing != scene.facing:
            return math.inf
        return math.sqrt(sum(one * one for one in self.deviations(scene).values()) / len(IDENTITY))

    def changed(self, scene: Scene) -> list[str]:
        """The attributes that are not the scene's."""
        return [name for name, value in self.attributes.items() if value != getattr(scene, name)]


def identity_targets(scene: Scene) -> list[float]:
    """The identity of a scene as the judge learns it: every factor over its standard deviation, around a typical scene."""
    return [(getattr(scene, name) - middle) / IDENTITY[name] for name, middle in _MIDDLE.items()]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


class Judge(nn.Module):
    """Five convolutions of stride 2, then one linear head for each attribute, for the facing and for the identity."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128, 160)
        self.features = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)), nn.Flatten())
        sizes = {**{name: len(values) for name, values in ATTRIBUTES.items()}, "facing": len(FACINGS), "identity": len(IDENTITY)}
        self.heads = nn.ModuleDict({name: nn.Linear(160 * 4, size) for name, size in sizes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """For pictures ``[B, 3, 64, 64]`` in [-1, 1]: logits of each attribute and of ``facing``, ``[B, values]``, and ``identity``,
        ``[B, factors]``, as :func:`identity_targets` gives it."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read_scenes(self, pictures: Tensor) -> list[Reading]:
        """What each picture shows."""
        outputs = self(pictures)
        best = {name: outputs[name].argmax(1).tolist() for name in (*ATTRIBUTES, "facing")}
        identity = outputs["identity"].double().tolist()
        return [
            Reading(
                {name: values[best[name][k]] for name, values in ATTRIBUTES.items()},
                FACINGS[best["facing"][k]],
                {name: _MIDDLE[name] + value * IDENTITY[name] for name, value in zip(IDENTITY, identity[k], strict=True)},
            )
            for k in range(len(pictures))
        ]

    def save(self, path: Path) -> None:
        """Writes the weights in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """The judge that ships with the package."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()
