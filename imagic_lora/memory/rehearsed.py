"""Peaks of flow transformers from earlier rehearsals: those of published bases are part of the package, others are cached on disk.

A rehearsal (:mod:`imagic_lora.training.rehearsing.rehearsal`) takes half a minute or more. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bases.architecture import Architecture
from ..core.config import RunConfig

_SHIPPED = "rehearsed.json"
_PROGRESS = {"steps", "learning_rate", "timesteps", "alpha", "noise"}  # settings of a stage that do not change its memory
_KNOWN_SEPARATELY = {"device", "dtype", "optimizer", "attention"}  # settings of the group memory that `Assumed` replaces, or none changes
_EDIT_MEMORY = ("idle", "vae_tiling", "vae_slicing", "quantize", "quantize_text")


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal counted, in bytes.

    Args:
        stages: weights, gradients, optimizer states and activations at the peak of every stage.
        counts: the counted weights of the denoiser, by the names of :class:`~imagic_lora.memory.trained.Counts`.
    """

    stages: dict[str, list[int]]
    counts: dict[str, int]


def fit_key(architecture: Architecture, run: RunConfig, assumed: Mapping[str, str]) -> str:
    """A short name for all that the memory of a fit depends on.

    Args:
        architecture: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer of the plan, by name.
    """
    memory = run.memory.model_dump(exclude=_KNOWN_SEPARATELY)
    training = {name: stage.model_dump(exclude=_PROGRESS) for name, stage in run.stages.items()}
    others = {"training": training, "optimizer": assumed["optimizer"], "previews": run.previews_every > 0}
    return _name("fit", architecture, run, assumed, memory | others)


def edit_key(architecture: Architecture, run: RunConfig, assumed: Mapping[str, str]) -> str:
    """As :func:`fit_key`, for the stages of an edit; these do not depend on how the adapter was trained."""
    memory = run.memory.model_dump(include=set(_EDIT_MEMORY))
    adapter = None if run.tune.mode == "embedding" else (run.tune.rank, run.tune.targets)
    return _name("edit", architecture, run, assumed, memory | {"adapter": adapter})


def _name(kind: str, architecture: Architecture, run: RunConfig, assumed: Mapping[str, str], settings: dict[str, Any]) -> str:
    idle = "keep" if run.memory.idle == "keep" else "release"  # offloading frees the same bytes of the card
    parts = {
        "kind": kind,
        "class": type(architecture).__name__,
        "configs": [_sizes(config) for config in (architecture.denoiser, architecture.vae, architecture.text_encoders)],
        "side": run.resolution or architecture.resolution,
        "assumed": [assumed["device"], assumed["dtype"]],
        "batch": run.edit.batch_size,
        "reference": run.edit.reference,
        **settings,
        "idle": idle,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _sizes(config: Any) -> Any:
    """A config without what libraries write beside the sizes."""
    if not isinstance(config, Mapping):
        return config
    written = ("dtype", "torch_dtype", "transformers_version", "architectures")
    return {name: _sizes(value) for name, value in config.items() if not name.startswith("_") and name not in written}


def recall(architecture: Architecture, run: RunConfig, assumed: Mapping[str, str], edit: bool = False) -> Rehearsed | None:
    """What an earlier rehearsal of the same sizes and settings counted; None if there was none.

    Args:
        architecture, run, assumed: as in :func:`fit_key`.
        edit: whether the stages of an edit are enough.
    """
    name = (edit_key if edit else fit_key)(architecture, run, assumed)
    found = _shipped().get(name)
    if found is None:
        try:
            found = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
            return Rehearsed({stage: [int(size) for size in sizes] for stage, sizes in found["stages"].items()}, dict(found["counts"]))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError):  # absent, damaged, or no home directory
            return None
    return Rehearsed(**found)


def remember(architecture: Architecture, run: RunConfig, assumed: Mapping[str, str], rehearsed: Rehearsed) -> None:
    """Writes what a rehearsal counted into the cache on disk; without a writable one it does nothing."""
    for name, content in entries(architecture, run, assumed, rehearsed).items():
        try:
            _folder().mkdir(parents=True, exist_ok=True)
            draft = _folder() / f".{name}.{os.getpid()}"
            draft.write_text(json.dumps(content), encoding="utf-8")
            draft.replace(_folder() / f"{name}.json")
        except (OSError, RuntimeError):
            return


def entries(architecture: Architecture, run: RunConfig, assumed: Mapping[str, str], rehearsed: Rehearsed) -> dict[str, Any]:
    """What a rehearsal is stored as, by key: for the same fit, and for edits with its adapter where that is LoRA or an embedding."""
    found = {fit_key(architecture, run, assumed): {"stages": rehearsed.stages, "counts": rehearsed.counts}}
    if run.tune.mode != "full":
        stages = {name: sizes for name, sizes in rehearsed.stages.items() if name in ("encode", "sample", "decode")}
        found[edit_key(architecture, run, assumed)] = {"stages": stages, "counts": rehearsed.counts}
    return found


@cache
def _shipped() -> dict[str, Any]:
    """The rehearsals of the published bases, which ``scripts/plan_table.py`` writes."""
    return json.loads(Path(__file__).with_name(_SHIPPED).read_text(encoding="utf-8"))["plans"]


def _folder() -> Path:
    """Folder of the cache for these versions. Raises RuntimeError for a user without a home directory."""
    versions = "-".join(version(name) for name in ("imagic-lora", "diffusers", "torch"))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagic-lora" / "plans" / versions
