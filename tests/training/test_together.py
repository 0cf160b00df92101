"""fit_together(): every photo of a group gets what a fit of it alone gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import opened, same, tiny_config, weights
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
from imagic_lora.core.conditioning import concatenate
from imagic_lora.core.config import RunConfig, TuneConfig
from imagic_lora.core.errors import ImagicError, NotFinite, Stopped
from imagic_lora.core.settings.merging import merged
from imagic_lora.memory.limits import OutOfMemory
from imagic_lora.photos.region import Region
from imagic_lora.training.fit import fit, result
from imagic_lora.training.grouping import Item, groups
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.resuming.checkpoints import Checkpoints
from imagic_lora.training.together import PhotoReport, fit_together

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


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors as one."""
    return {"whole": torch.cat([value.flatten() for value in tensors.values()])}


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


SLOW = {"klein", "sd3", "sdxl", "sd, checkpointing", "sd, token vectors and all layers", "sd, noise on the embedding"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
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
        # the first steps of Adam divide rounding by rounding where a gradient is almost 0: single weights differ, more on some CPUs
        assert apart(tensors_of(single), tensors_of(other)) < 1e-2
        assert apart(whole(tensors_of(single)), whole(tensors_of(other))) < 3e-4
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
    return result(fit_together(items, config, store, base=base, **options))  # pyright: ignore[reportArgumentType]


def test_batched_layers_are_those_of_peft(base_of: Callable[..., Base]) -> None:
    """Initial weights to the bit; output and gradients of two samples of each of two adapters to rounding, for every layer there is."""
    base, noise, times = (
        base_of("sdxl"),
        torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1, 300, 500, 900]),
    )
    texts = [base.with_added_conditions(base.encode_prompt(prompt), 32, 32, 1.0) for prompt in PROMPTS[:2]]
    config, seeds = TuneConfig(rank=3, alpha=2.0, targets="all"), [5, 6]
    with batched(base, config, seeds) as lora:
        initial = [{name: layer.detach().clone() for name, layer in layers.items()} for layers in lora.sets]
        for layers in lora.sets:
            for k, layer in enumerate(layers.values()):
                layer.data += 0.1 * torch.randn(layer.shape, generator=torch.Generator().manual_seed(k))
        with lora.using([0, 1]):
            outputs = base.predict(noise, times, concatenate([text.expand(2) for text in texts]))
            outputs.square().sum().backward()
        with lora.using([0, 1, 0]), pytest.raises(ValueError, match="a batch of 4 in 3 equal parts"):
            base.predict(noise, times, concatenate([text.expand(2) for text in texts]))
    for k, text in enumerate(texts):
        own = slice(2 * k, 2 * k + 2)
        with attached(base, config, seeds[k]) as layers:
            assert same({name: layer.detach() for name, layer in layers.items()}, initial[k])
            copy_into(layers, lora.sets[k])
            single = base.predict(noise[own], times[own], text)
            single.square().sum().backward()
            assert apart({"output": single.detach()}, {"output": outputs[own].detach()}) < 1e-5
            gradients = [{name: layer.grad for name, layer in one.items() if layer.grad is not None} for one in (layers, lora.sets[k])]
            assert len(gradients[0]) == len(layers)
            assert apart(*gradients) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
def test_optimizer_states_are_those_of_a_fit_alone(optimizer: str, large_folder: Path, photos: list[Path], tmp_path: Path) -> None:
    """In checkpoints of both stages, and fits alone go on from those of a group."""
    base, items = opened(large_folder, optimizer=optimizer), items_of(photos)
    config = tiny_config(large_folder, tune={"rank": 64, "targets": "attention"}, memory={"optimizer": optimizer})
    for stage, step in (("embed", 2), ("tune", 3)):
        stores = [Store(tmp_path / f"{stage}-{way}") for way in ("alone", "together")]
        for item in items:
            stopped_at(fit(item.photo, item.prompt, with_seed(config, item), stores[0], item.name, base=base), stage, step)
        stopped_at(fit_together(items, config, stores[1], base=base), stage, step, len(items))
        for item in items:
            one, other = (Checkpoints(store.checkpoints(item.name)).newest() for store in stores)
            assert one is not None
            assert other is not None
            assert one.record.model_dump(exclude={"seconds", "files"}) == other.record.model_dump(exclude={"seconds", "files"})
            kinds = {name: (value.dtype, value.shape) for name, value in one.tensors.items()}
            assert kinds == {name: (value.dtype, value.shape) for name, value in other.tensors.items()}
            assert any(name.startswith("optimizer/") for name in kinds)
            assert not (optimizer == "adam8bit" and stage == "tune") or torch.uint8 in {dtype for dtype, _ in kinds.values()}
            assert (
                apart(*({name: value.float() for name, value in c.tensors.items() if value.dtype != torch.uint8} for c in (one, other)))
                < 2e-3
            )
    item = items[1]
    resumed = result(fit(item.photo, item.prompt, with_seed(config, item), stores[1], item.name, base=base, resume=True))
    whole = alone(items[1:2], config, Store(tmp_path / "whole"), base)[item.name]
    assert isinstance(resumed, Adapter)
    assert apart(tensors_of(whole), tensors_of(resumed)) < 2e-2


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with tensors of 4,096 elements and more, whose states 8 bits are for."""
    return save_tiny(tmp_path_factory.mktemp("large") / "base", width=64)


def with_seed(config: RunConfig, item: Item) -> RunConfig:
    """The settings of the fit of a photo alone."""
    return config.model_copy(update={"seed": item.seed})


def stopped_at(steps: Any, stage: str, step: int, photos: int = 1) -> None:
    """Closes fits after a step of a stage, of so many photos."""
    found = 0
    for report in steps:
        report = getattr(report, "step", None) if isinstance(report, PhotoReport) else report
        found += report is not None and (report.stage, report.step) == (stage, step)
        if found == photos:
            steps.close()
            return
    raise AssertionError(f"no step {step} of stage {stage}")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("embed", 2), ("tune", 2)])
def test_a_stopped_group_goes_on(
    stage: str, step: int, base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """From the checkpoint of each photo, with one that was further and one that had not begun; nothing is trained twice."""
    base, config, items = base_of("sd"), config_of(folders_of("sd")), items_of(photos)
    whole, store = alone(items, config, Store(tmp_path / "alone"), base), Store(tmp_path / "group")
    stopped_at(fit(items[0].photo, items[0].prompt, with_seed(config, items[0]), store, items[0].name, base=base), "tune", 3)
    seen: list[PhotoReport] = []
    begun = [with_resume(items[0]), items[1]]
    with pytest.raises(Stopped, match="are saved"):
        collect(fit_together(begun, config, store, base=base, stop=lambda: (stage, step) in steps_of(seen, items[1].name)), seen)
    assert steps_of(seen, items[0].name)[:1] == ([("tune", 4)] if stage == "tune" else [])
    assert store.names() == []
    assert store.unfinished() == [item.name for item in items[:2]]
    again = list(fit_together([*map(with_resume, items[:2]), items[2]], config, store, base=base))
    expected = [("embed", k) for k in (1, 2, 3)] + [("tune", k) for k in (1, 2, 3, 4)]
    assert steps_of([*seen, *again], items[1].name) == expected
    assert steps_of([*seen, *again], items[0].name) == [("tune", 4)]
    for item in items:
        assert apart(tensors_of(whole[item.name]), tensors_of(store.read(item.name))) < 1e-3
    assert store.unfinished() == []


def collect(reports: Iterable[PhotoReport], seen: list[PhotoReport]) -> None:
    """Appends every report as it comes."""
    for report in reports:
        seen.append(report)  # those before an exception count, too


def with_resume(item: Item) -> Item:
    return replace(item, resume=True)


def steps_of(reports: Sequence[PhotoReport], name: str) -> list[tuple[str, int]]:
    """The steps of a photo."""
    return [(report.step.stage, report.step.step) for report in reports if report.name == name and report.step]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["embed", "tune"])
def test_a_photo_that_fails_leaves_the_others_as_they_are(
    stage: str,
    base_of: Callable[..., Base],
    folders_of: Callable[[str], Path],
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss that is not finite, in the middle of a stage; its checkpoint stays, the others are stored."""
    base, config, items = base_of("sd"), config_of(folders_of("sd"), {"checkpoint": {"steps": 1}}), items_of(photos)
    whole, store, calls = alone(items, config, Store(tmp_path / "alone"), base), Store(tmp_path / "group"), 0

    def spoiled(*given: Any) -> Tensor:
        nonlocal calls
        losses = denoising_loss(*given)
        calls += losses.requires_grad
        bad = len(losses) == 6 and calls == (2 if stage == "embed" else 5)
        return losses * torch.tensor([1, 1, torch.nan, 1, 1, 1]) if bad and losses.requires_grad else losses

    monkeypatch.setattr(shared, "denoising_loss", spoiled)
    results = run(items, config, store, base)
    error = results[items[1].name]
    assert isinstance(error, NotFinite)
    assert f"stage {stage}" in error.got
    assert f"of stage {stage} are saved" in str(error)
    assert store.unfinished() == [items[1].name]
    assert store.names() == [items[0].name, items[2].name]
    for item in (items[0], items[2]):
        assert apart(tensors_of(whole[item.name]), tensors_of(store.read(item.name))) < 1e-3
    assert Checkpoints(store.checkpoints(items[1].name)).newest() is not None


def test_photos_that_cannot_be_fitted_do_not_end_the_others(
    base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """No file, an empty prompt, a taken name, a name that is a path, a negative seed, nothing to resume, a region outside."""
    base, config, store = base_of("sd"), config_of(folders_of("sd")), Store(tmp_path / "store")
    alone(items_of(photos)[:1], config, store, base)
    good = items_of(photos)[0]
    items = [
        good,  # taken
        replace(good, name="missing", photo=tmp_path / "none.png"),
        replace(good, name="empty", prompt=" "),
        replace(good, name="nothing", resume=True),
        replace(good, name="seed", seed=-1),
        replace(good, name="../path"),
        replace(good, name="outside", region=Region(0, 0, 99, 99)),
        replace(good, name="good"),
    ]
    results = run(items, config, store, base)
    assert [type(found) for found in results.values()] == [ImagicError] * 7 + [Adapter]
    assert store.names() == ["good", "photo-0"]
    assert not list(tmp_path.rglob("*.lock"))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mode full": ({"mode": "full"}, {}, "--mode full"),
    "updates during the backward pass": ({}, {"optimizer_in_backward": True}, "--optimizer-in-backward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_group_does_not_support_is_named(
    case: str, base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """Before anything is trained or written."""
    given, memory, message = REFUSED[case]
    config = tiny_config(folders_of("sd"), given.get("mode", "lora"))
    with pytest.raises(ImagicError, match=message):
        run(items_of(photos), config, Store(tmp_path / "store"), base_of("sd", **memory))
    assert Store(tmp_path / "store").unfinished() == Store(tmp_path / "store").names() == []


def test_groups_are_of_one_canvas(
    base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], photo_file: Path, tmp_path: Path
) -> None:
    """Full ones come first, and photos that cannot be read are alone; another grouping is refused, and one name twice."""
    base, config = base_of("sd"), config_of(folders_of("sd"))
    items = [*items_of(photos), Item(photo_file, "a", "wide"), Item(tmp_path / "none.png", "a", "none"), Item(photos[0], "b", "last")]
    found = [[item.name for item in group] for group in groups(items, config, base.architecture, 2)]
    assert found == [["photo-0", "photo-1"], ["none"], ["photo-2", "last"], ["wide"]]
    part = replace(items[3], region=Region(0, 0, 30, 30), name="part")
    assert [len(group) for group in groups([items[0], part], config, base.architecture, 2)] == [2]
    with pytest.raises(ImagicError, match="photo-0 32x32, wide 32x24"):
        run([items[0], items[3]], config, Store(tmp_path / "store"), base)
    with pytest.raises(ImagicError, match="several photos of the name"):
        run([items[0], replace(items[1], name="Photo-0")], config, Store(tmp_path / "store"), base)


def test_a_group_that_does_not_fit_the_memory_is_saved(
    base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how many photos there are, and fewer of them go on."""
    base, config, store, items = base_of("sd"), config_of(folders_of("sd")), Store(tmp_path / "store"), items_of(photos)
    calls = 0

    def too_much(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise MemoryError
        return denoising_loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(shared, "denoising_loss", too_much)
        with pytest.raises(OutOfMemory, match=r"with 3 photos together .* fit fewer photos together"):
            run(items, config, store, base)
    assert store.unfinished() == [item.name for item in items]
    assert all(isinstance(found, Adapter) for found in run([with_resume(item) for item in items[:2]], config, store, base).values())


@pytest.mark.slow
def test_photos_stop_early_one_by_one(
    base_of: Callable[..., Base], folders_of: Callable[[str], Path], photos: list[Path], tmp_path: Path
) -> None:
    """Each after as many steps as alone, with previews made by its own layers on the way."""
    base, items = base_of("sd"), items_of(photos)
    changes = {"embed": {"steps": 12}, "tune": {"steps": 12}, "edit": {"steps": 2}}
    monitoring = {"convergence_every": 2, "early_stop": "both", "patience": 1, "min_improvement": 0.002, "preview_every": 2}
    config = config_of(folders_of("sd"), changes | {"monitoring": monitoring})
    singles, found = alone(items, config, Store(tmp_path / "alone"), base), run(items, config, Store(tmp_path / "group"), base)
    done = [{stage: one.done for stage, one in single.record.stages.items()} for single in singles.values()]
    assert len({tuple(steps.values()) for steps in done}) > 1, done
    for steps, (name, single) in zip(done, singles.items(), strict=True):
        other = found[name]
        assert isinstance(other, Adapter), other
        assert {stage: one.done for stage, one in other.record.stages.items()} == steps
        for picture in ("previews.png", "preview.png"):
            pixels = [np.asarray(Image.open(adapter.folder / picture).convert("RGB"), dtype=int) for adapter in (single, other)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 3
