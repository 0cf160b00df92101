"""fit(): from a photo and a target prompt to an adapter that plain diffusers can use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from common import MODES, PROMPT, TUNED, SimulatedProcess, array, each, opened, output, same, slow_but, tiny_config, weights
from PIL import Image
from safetensors.torch import load_file

import imagic_lora.training.fit as imagic
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.record import PREVIEW
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.core.config import Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.memory.prediction import predict
from imagic_lora.training.fit import fit, result

REPORTS = [("embed", k, 3) for k in (1, 2, 3)] + [("tune", k, 4) for k in (1, 2, 3, 4)]
STEPS: dict[Mode, int] = {"lora": len(REPORTS), "full": len(REPORTS), "embedding": 3}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_fit_twice_is_the_same_bytes(
    folder: Path, photo_file: Path, fitted: Callable[..., Adapter], tmp_path: Path, mode: Mode
) -> None:
    """Every safetensors file, on a base that was already in memory and one that was not."""
    again = result(fit(photo_file, PROMPT, tiny_config(folder, mode), Store(tmp_path), "again", base=opened(folder)))
    assert again is not None
    first, second = ({p.relative_to(a.folder): p.read_bytes() for p in a.folder.rglob("*.safetensors")} for a in (fitted(mode), again))
    assert len(first) == (1 if mode == "embedding" else 2)
    assert first == second


@pytest.mark.parametrize("mode", MODES)
def test_levers_that_do_not_change_the_arithmetic_leave_the_bytes_as_they_are(
    folder: Path, photo_file: Path, fitted: Callable[..., Adapter], tmp_path: Path, mode: Mode
) -> None:
    """Weights and embeddings to the bit, the preview to rounding."""
    levers = {"idle": "release", "vae_slicing": True, "optimizer_in_backward": True}
    changed = result(fit(photo_file, PROMPT, tiny_config(folder, mode, memory=levers), Store(tmp_path), "levers"))
    assert changed is not None
    first, second = ({p.relative_to(a.folder): p.read_bytes() for p in a.folder.rglob("*.safetensors")} for a in (fitted(mode), changed))
    assert first == second
    previews = [array(Image.open(adapter.folder / PREVIEW).convert("RGB")) for adapter in (fitted(mode), changed)]
    assert np.abs(previews[0] - previews[1]).max() <= 1


@pytest.mark.parametrize(("mode", "steps"), [("lora", 1), ("lora", 5), ("full", 5), ("full", 7), ("embedding", 2), ("embedding", 3)])
def test_a_shared_base_is_given_back(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode, steps: int) -> None:
    """Bit-equal and frozen after the whole of a fit, and after one closed in either stage, which leaves no adapter."""
    base, store = opened(folder), Store(tmp_path / "store")
    before, picture = weights(base.denoiser), output(base)
    run = fit(photo_file, PROMPT, tiny_config(folder, mode), store, "one", base=base)
    assert len(list(islice(run, steps))) == steps
    if steps == STEPS[mode]:
        assert list(run) == []
    run.close()
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())
    assert store.names() == (["one"] if steps == STEPS[mode] else [])


@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_a_fit_opens_is_let_go(
    folder: Path, photo_file: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, and in full with the trained weights still in it: no copy is held to put them back."""
    before, opening, held = weights(opened(folder).denoiser), imagic.load_base, []

    def opened_here(*arguments, **settings) -> Base:
        held.append(opening(*arguments, **settings))
        return held[0]

    monkeypatch.setattr(imagic, "load_base", opened_here)
    result(fit(photo_file, PROMPT, tiny_config(folder, mode), Store(tmp_path), "one"))
    assert len(held) == 1
    assert same(weights(held[0].denoiser), before) == (mode != "full")
    assert not any(parameter.requires_grad for parameter in held[0].denoiser.parameters())


def test_reports_come_in_order(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """One after every step of both stages; steps.jsonl has the same, line by line."""
    run = fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one")
    reports = list(run)
    assert [(report.stage, report.step, report.steps) for report in reports] == REPORTS
    lines = [json.loads(line) for line in (tmp_path / "one/steps.jsonl").read_text().splitlines()]
    relative = [{} if r.relative_loss is None else {"relative_loss": round(r.relative_loss, 6)} for r in reports]
    losses = [{"stage": r.stage, "step": r.step, "loss": round(r.loss.item(), 6)} for r in reports]
    assert lines == [loss | evaluated for loss, evaluated in zip(losses, relative, strict=True)]


@each("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_at_once(folder: Path, photo_file: Path, tmp_path: Path, prompt: str) -> None:
    """Before the first step."""
    with pytest.raises(ImagicError, match="empty prompt"):
        next(fit(photo_file, prompt, tiny_config(folder), Store(tmp_path), "one"))


def test_a_preview_without_steps_is_refused_at_once(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Before the training, and not after it."""
    config = tiny_config(folder, edit={"start": "image", "steps": 2, "strength": 0.1})
    with pytest.raises(ImagicError, match="strength"):
        next(fit(photo_file, PROMPT, config, Store(tmp_path), "one"))


def test_a_taken_name_is_refused_at_once(folder: Path, photo_file: Path, fitted: Callable[..., Adapter]) -> None:
    """Before the first step; with overwrite it is not."""
    there = fitted("lora")
    store, config = Store(there.folder.parent), tiny_config(folder)
    with pytest.raises(ImagicError, match="exists"):
        next(fit(photo_file, PROMPT, config, store, there.record.name))
    run = fit(photo_file, PROMPT, config, store, there.record.name, overwrite=True)
    assert next(run).step == 1
    run.close()
    store.read(there.record.name)


def test_too_little_memory_is_refused_before_loading(
    folder: Path, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's worst stage, without its allowances, is what must be free: one byte less is refused, and nothing is opened."""
    config = tiny_config(folder, "full")
    stages = predict(architecture_of(str(folder)), config).stages
    worst = max(stages, key=lambda name: stages[name].total)
    monkeypatch.setattr(imagic, "free_memory", lambda device: stages[worst].total - 1)
    with monkeypatch.context() as patch:
        patch.setattr(imagic, "load_base", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(ImagicError, match=rf"stage {worst} needs .* \(predicted\), and .* is available on this machine"):
            next(fit(photo_file, PROMPT, config, Store(tmp_path), "one"))
    monkeypatch.setattr(imagic, "free_memory", lambda device: stages[worst].total)
    assert next(fit(photo_file, PROMPT, config, Store(tmp_path), "one")).step == 1


@pytest.mark.parametrize("mode", MODES)
def test_another_process_writes_nothing(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """It trains to the end, and leaves store and base alone."""
    base, store = opened(folder), Store(tmp_path / "store")
    before, done = weights(base.denoiser), []
    run = fit(photo_file, PROMPT, tiny_config(folder, mode), store, "one", base=base, processes=SimulatedProcess(1, 2))

    def driven():
        done.append((yield from run))

    assert len(list(driven())) == STEPS[mode]
    assert done == [None]
    assert not store.root.exists()
    assert same(weights(base.denoiser), before)


def test_the_record_says_how_it_was_made(folder: Path, photo_file: Path, fitted: Callable[..., Adapter]) -> None:
    """Base, photo, prompt, settings, weights and losses."""
    record = fitted("lora").record
    losses = [json.loads(line) for line in (fitted("lora").folder / "steps.jsonl").read_text().splitlines()]
    assert record.base.fingerprint == opened(folder).fingerprint
    assert record.source.sha256 == hashlib.sha256(photo_file.read_bytes()).hexdigest()
    assert (record.source.size, record.source.box) == ((50, 37), (0, 0, 32, 24))
    assert (record.prompt, record.config) == (PROMPT, tiny_config(folder))
    assert [(part.component, part.mode) for part in record.parts] == [("unet", "lora")]
    assert record.losses == {
        stage: tuple(one[k]["loss"] for k in (0, -1)) for stage in ("embed", "tune") if (one := [x for x in losses if x["stage"] == stage])
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_stored_embeddings_are_target_optimised_and_null(folder: Path, fitted: Callable[..., Adapter], mode: Mode) -> None:
    """The target embedding is that of the prompt, the optimised one is not, null is that of an empty prompt; all fp32."""
    stored, base = load_file(fitted(mode).folder / "embeddings.safetensors"), opened(folder)
    assert sorted(stored) == ["null.tokens", "optimised.tokens", "target.tokens"]
    assert torch.equal(stored["target.tokens"], base.encode_prompt(PROMPT).tokens)
    assert torch.equal(stored["null.tokens"], base.encode_prompt("").tokens)
    assert not torch.equal(stored["optimised.tokens"], stored["target.tokens"])
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_mode_embedding_is_stage_1_alone(folder: Path, photo_file: Path, fitted: Callable[..., Adapter], tmp_path: Path) -> None:
    """The embedding is that of any other mode, bit for bit; no weights are listed, and losses and times are those of stage 1."""
    run = fit(photo_file, PROMPT, tiny_config(folder, "embedding"), Store(tmp_path), "one")
    assert [(report.stage, report.step, report.steps) for report in run] == REPORTS[:3]
    record = Store(tmp_path).read("one").record
    assert (record.parts, record.weight_files) == ([], [])
    assert list(record.losses) == list(record.seconds) == ["embed"]
    assert record.losses["embed"] == fitted("lora").record.losses["embed"]
    stored = [load_file(path / "embeddings.safetensors") for path in (tmp_path / "one", fitted("lora").folder)]
    assert same(*stored)


@pytest.mark.parametrize("mode", slow_but(["lora"], TUNED))
def test_a_fit_in_bf16(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """Opens the base itself, with master weights where it must, and is near the fit in fp32."""
    losses = []
    for dtype in ("fp32", "bf16"):
        config = tiny_config(folder, mode, memory={"dtype": dtype})
        losses.append([report.loss.item() for report in fit(photo_file, PROMPT, config, Store(tmp_path), dtype)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_photo_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before a base is opened."""
    with pytest.raises(ImagicError, match="cannot be read"):
        next(fit(tmp_path / "none.png", PROMPT, tiny_config(folder), Store(tmp_path), "one"))
