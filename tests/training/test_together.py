"""fit_together(): every photo of a group gets what a fit of it alone gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import each, opened, same, tiny_config, weights
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny, save_tiny_klein, save_tiny_sd3, save_tiny_sdxl
from torch import Tensor

import imagic_lora.training.shared as shared
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.batched import batched, copy_into
from imagic_lora.adapters.lora import attached
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.conditioning import concatenate
from imagic_lora.core.config import RunConfig, TuneConfig
from imagic_lora.core.errors import ImagicError, NotFinite, Stopped
from imagic_lora.core.settings import merged
from imagic_lora.memory.limits import OutOfMemory
from imagic_lora.photos.region import Region
from imagic_lora.training.fit import fit, result
from imagic_lora.training.resuming.checkpoints import Checkpoints
from imagic_lora.training.together import Item, PhotoReport, fit_together, groups

SAVED: dict[str, Callable[[Path], Path]] = {"sd": save_tiny, "sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3, "klein": save_tiny_klein}
PROMPTS = ("a cat", "two dogs", "b")
FLOW = {"embed": {"tokens": "words", "relative": True}, "tune": {"targets": "attention+mlp"}}


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves a tiny base of a family once."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: SAVED[name](root / name))


@pytest.fixture(scope="module")
def base_of(folders_of: Callable[[str], Path]) -> Callable[..., Base]:
    """A function that opens a base of a family with memory levers, once."""
    return cache(lambda name, **memory: opened(folders_of(name), **memory))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three photos of one size."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(len(PROMPTS)):
        pixels = np.random.default_rng(k).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
    return sorted(folder.iterdir())


def items_of(photos: Sequence[Path], **changes: Any) -> list[Item]:
    """The photos with a prompt, a name and a seed each."""
    return [Item(photo, prompt, f"photo-{k}", seed=k, **changes) for k, (photo, prompt) in enumerate(zip(photos, PROMPTS, strict=False))]


def alone(items: Sequence[Item], config: RunConfig, store: Store, base: Base) -> dict[str, Adapter]:
    """The fits one after the other."""
    found: dict[str, Adapter] = {}
    for item in items:
        adapter = result(fit(item.photo, item.prompt, config.model_copy(update={"seed": item.seed}), store, item.name, base=base))
        assert adapter is not None
        found[item.name] = adapter
    return found


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors that an adapter stores, by file and name."""
    found: dict[str, Tensor] = {}
    for path in sorted(adapter.folder.glob("*.safetensors")):
        found |= {f"{path.name}/{name}": value.float() for name, value in load_file(path).items()}
    return found


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, as a share of the norm of the tensor."""
    assert list(one) == list(other)
    return max(((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-6)).item() for name in one)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd": ("sd", {}, {}),
    "sd, embedding alone": ("sd", {"tune": {"mode": "embedding", "steps": 300, "rank": 16, "targets": "attention"}}, {}),
    "sd, token vectors and all layers": ("sd", {"embed": {"space": "input"}, "tune": {"targets": "all"}}, {}),
    "sd, noise on the embedding": ("sd", {"embed": {"noise": 0.1}}, {}),
    "sd, checkpointing": ("sd", {}, {"gradient_checkpointing": True, "idle": "release"}),
    "sdxl": ("sdxl", {"embed": {"batch_size": 3}}, {}),
    "sd3": ("sd3", FLOW, {}),
    "klein": ("klein", FLOW, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_result_is_that_of_a_fit_alone(
    case: str, base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """Weights, embeddings, losses and relative losses, and the record but for times and the memory; the base stays as it was."""
    family, changes, memory = CASES[case]
    base, config = base_of(family, **memory), config_of(folders_of(family), changes)
    before, kinds = weights(base.denoiser), [type(module) for module in base.denoiser.modules()]
    items = items_of(photos)
    singles = alone(items, config, Store(tmp_path / "alone"), base)
    together = run(items, config, Store(tmp_path / "together"), base)
    assert same(weights(base.denoiser), before)
    assert [type(module) for module in base.denoiser.modules()] == kinds
    assert not any(module._forward_hooks for module in base.denoiser.modules())
    assert len({tuple(tensors_of(adapter)["embeddings.safetensors/target.tokens"].flatten().tolist()) for adapter in singles.values()}) == 3
    for name, single in singles.items():
        other = together[name]
        assert isinstance(other, Adapter), other
        assert (
            apart(tensors_of(single), tensors_of(other)) < 1e-3
        )  # the first steps of Adam divide rounding by rounding where a gradient is almost 0
        lines = [[json.loads(line) for line in (a.folder / "steps.jsonl").read_text().splitlines()] for a in (single, other)]
        assert [(line["stage"], line["step"]) for line in lines[0]] == [(line["stage"], line["step"]) for line in lines[1]]
        for key in ("loss", "relative_loss"):
            values = [[line[key] for line in one if key in line] for one in lines]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert sorted(path.name for path in single.folder.iterdir()) == sorted(path.name for path in other.folder.iterdir())
        changing = {"created", "losses", "seconds", "stages", "peak_memory", "files", "runtime"}
        assert single.record.model_dump(exclude=changing) == other.record.model_dump(exclude=changing)
        assert other.record.runtime == single.record.runtime | {"together": "3"}
    assert Store(tmp_path / "together").unfinished() == []


def config_of(folder: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Some steps of each stage, with relative losses."""
    changes = changes or {}
    if changes.get("tune", {}).get("mode") == "embedding":
        return tiny_config(folder, "embedding", monitoring={"convergence_every": 2})
    return tiny_config(folder, **merged({"monitoring": {"convergence_every": 2}, "edit": {"guidance_scale": 1.0}}, changes))


def run(items: Sequence[Item], config: RunConfig, store: Store, base: Base, **options: Any) -> dict[str, Adapter | Exception]:
    """The results of a group."""
    found = result(fit_together(items, config, store, base=base, **options))  # pyright: ignore[reportArgumentType]
    return found
