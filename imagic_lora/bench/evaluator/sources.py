"""The models of the evaluator by name, and where each is loaded from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError

CLIPS = {"clip-b32": "openai/clip-vit-base-patch32", "clip-l14": "openai/clip-vit-large-patch14"}
DINO = "facebook/dino-vitb8"
LPIPS = {"lpips-alex": "alexnet-owt-7be5be79.pth", "lpips-vgg": "vgg16-397923af.pth", "lpips-squeeze": "squeezenet1_1-b8a52dc0.pth"}
"""Files of the backbones, as torchvision publishes them and keeps them in the cache of torch.hub."""
PIXELS = "pixels"
METRICS = (PIXELS, *CLIPS, *LPIPS, "dino")
"""What a run can measure: pixels needs no model, each of the others is one."""


@dataclass(frozen=True)
class Sources:
    """Which metrics are measured, and where their models come from.

    Args:
        metrics: some of :data:`METRICS`.
        named: pairs of a model and its folder, file or hub id, for those that are not the published ones.
        offline: whether only caches are used.
    """

    metrics: tuple[str, ...] = METRICS
    named: tuple[tuple[str, str], ...] = ()
    offline: bool = False

    def of(self, model: str) -> str | None:
        """Returns the folder, file or hub id of a model; None for the published file of an LPIPS backbone."""
        return dict(self.named).get(model, CLIPS.get(model) or (DINO if model == "dino" else None))

    def models(self) -> list[str]:
        """Returns the models that are loaded."""
        return [name for name in METRICS if name in self.metrics and name != PIXELS]


def parse_sources(metrics: str, models: Sequence[str], offline: bool) -> Sources:
    """Parses ``--metrics``, ``--model`` and ``--offline``.

    Args:
        metrics: ``all``, or names separated by commas.
        models: each ``NAME=SOURCE``.
        offline: whether only caches are used.

    Raises:
        ImagicError: a name is unknown, a model is given twice, or one that is not measured.
    """
    wanted = METRICS if metrics == "all" else tuple(dict.fromkeys(name.strip() for name in metrics.split(",")))
    for name in wanted:
        if name not in METRICS:
            expected = f"all, or one or more of {', '.join(METRICS)}, separated by commas"
            raise ImagicError(f"--metrics {metrics} has {name!r}", expected, "correct the list of metrics")
    named: dict[str, str] = {}
    for text in models:
        name, equals, source = text.partition("=")
        known = [metric for metric in METRICS if metric != PIXELS]
        if not equals or not source or name not in known or name in named:
            expected = f"NAME=SOURCE, each name once, with a name of {', '.join(known)}"
            raise ImagicError(f"--model {text}", expected, "use for example --model clip-l14=FOLDER")
        if name not in wanted:
            raise ImagicError(f"--model {name} without {name} in --metrics", "models of metrics that are measured", "leave one of them out")
        named[name] = source
    return Sources(tuple(name for name in METRICS if name in wanted), tuple(sorted(named.items())), offline)


def identity(source: str, network: Any) -> str:
    """Returns what tells the weights of a model of transformers from others: the commit of the hub, or a hash of the files of a folder."""
    folder = Path(source)
    if folder.is_dir():
        return files_hash(sorted(folder.glob("*.safetensors")))
    return f"commit {getattr(network.config, '_commit_hash', None) or 'unknown'}"


def files_hash(files: Sequence[Path]) -> str:
    """Returns a hash of the contents of files."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {total.hexdigest()[:16]}"
