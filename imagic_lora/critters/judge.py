"""The judge: a small separate classifier of the five attributes, used only to score.

It shares nothing with the base or with the CLIP model: no weights, no training loop of theirs, no captions.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scene import ATTRIBUTES

WEIGHTS = Path(__file__).parent.parent / "data" / "critters" / "judge.safetensors"


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


class Judge(nn.Module):
    """Five convolutions of stride 2, then one linear head for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128, 128)
        self.features = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 4, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of each attribute, ``[B, values]``, for pictures ``[B, 3, 64, 64]`` in [-1, 1]."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def see(self, pictures: Tensor) -> list[dict[str, str]]:
        """What each picture shows: the most likely value of every attribute."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(pictures).items()}
        return [{name: ATTRIBUTES[name][best[name][k]] for name in best} for k in range(len(pictures))]

    def save(self, path: Path) -> None:
        """Writes the weights in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """The judge that ships with the package."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()
