"""NaN and infinity injected into every tensor: rejected at once, never written to disk, and the last good state can be resumed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from common import TUNED, opened, same, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imagic_lora.training.run as run
from imagic_lora.adapters.full import WEIGHTS
from imagic_lora.adapters.lora import LORA_FILE
from imagic_lora.adapters.record import EMBEDDINGS, RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.sampling.editor import Editor
from imagic_lora.training import stage as stages
from imagic_lora.training.fit import result
from imagic_lora.training.resuming.checkpoints import Checkpoints
from imagic_lora.training.stage import Stage, StepReport

from .fitted import STAGES, STEPS, Case, Fitted, drawn, files, fitted, forged, verdict

VALUES = (math.nan, math.inf)
PLACES = ("latents", "loss", "gradients", "weights")
NAME = "rex"
ALL = [(stage, step + 1) for stage in STAGES for step in range(STEPS)]


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """At most ``cases`` of the cases, in a random order."""
    made, work = fitted(folder), folder / "numbers"
    every = [*_steps(made, work), *_saves(made, work), *_files(made, work)]
    for case in drawn(every, cases, seed):
        shutil.rmtree(work, ignore_errors=True)
        yield verdict(case)


def _steps(made: Fitted, work: Path) -> Iterator[Case]:
    for (place, value), mode, stage, k in product([*product(PLACES, VALUES), ("optimiser", math.nan)], TUNED, STAGES, range(STEPS)):
        last = place == "optimiser" and k == STEPS - 1  # its states are not used any more
        bad = None if last else STAGES.index(stage) * STEPS + k
        yield (
            f"{value} in the {place} of {mode}, {stage} {k + 1}",
            partial(_fitted, made, work, mode, _in_step(place, stage, k, value), bad),
        )
    for stage, closed in product(STAGES, (True, False)):
        yield f"{'closed' if closed else 'stopped'} with nan in the optimiser, {stage} 2", partial(_ended, made, work, stage, closed)


def _saves(made: Fitted, work: Path) -> Iterator[Case]:
    for value, mode in product(VALUES, TUNED):
        for place, inside in {"saved weights": _in_weights("write_files", value), "saved embedding": _in_embedding(value)}.items():
            yield f"{value} in the {place} of {mode}", partial(_fitted, made, work, mode, inside, len(ALL))
        yield f"{value} in the pictured weights of {mode}", partial(_fitted, made, work, mode, _in_weights("preview", value), len(ALL))
        yield f"{value} in a checkpoint of {mode}", partial(_fitted, made, work, mode, _in_checkpoint(value), STEPS)
    yield "weights beyond half precision", partial(_fitted, made, work, "full", _in_weights("write_files", 1e6), len(ALL))


def _files(made: Fitted, work: Path) -> Iterator[Case]:
    for value, part in product(VALUES, ("unet", "vae", "text_encoder")):
        yield f"{value} in the base's {part}", partial(_opened, made, work, part, value)
    for value, (mode, file) in product(VALUES, (("lora", LORA_FILE), ("full", f"unet/{WEIGHTS}"), ("lora", EMBEDDINGS))):
        yield f"{value} in {file} of an adapter", partial(_loaded, made, work, mode, file, value)


def _fitted(made: Fitted, work: Path, mode: Mode, inside: AbstractContextManager[object], bad: int | None) -> None:
    """A fit that fails and is then resumed.

    Args:
        bad: number of steps before the failure; None if the fit must succeed.
    """
    store, reports = Store(work), list[tuple[str, int]]()
    saved, before = Checkpoints(store.checkpoints(NAME)), weights(made.base.denoiser)
    error = None
    with inside:
        try:
            for report in made.fit(store, NAME, made.config(mode)):
                reports.append((report.stage, report.step))
        except ImagicError as caught:
            error = caught
    assert same(before, weights(made.base.denoiser)), "the base has changed"
    _check_finite(work)
    if bad is None:
        assert error is None, f"rejected: {error}"
    else:
        assert error is not None, "no error"
        done = min(len(reports), bad)  # a reported step may fail when its state is saved
        _check_advice(error)
        assert reports[:bad] == ALL[:bad], f"stopped after {reports[-1:]}"
        assert len(reports) <= bad + 1, f"stopped after {reports[-1:]}"
        newest = saved.newest()
        assert ((newest.record.stage, newest.record.step) if newest else None) == (ALL[done - 1] if done else None), "the wrong checkpoint"
        if newest and bad < len(ALL):
            assert f"{newest.record.step} of {STEPS} steps of stage {newest.record.stage} are saved" in error.got, f"not named: {error}"
        assert store.unfinished() == ([NAME] if newest else []), "what is unfinished is not listed, or what is not is"
        result(made.fit(store, NAME, made.config(mode), resume=newest is not None))
    found, clean = files(work / NAME), files(made.store.root / mode)
    assert found.keys() == clean.keys()
    assert not (other := [name for name in clean if name != RECORD and found[name] != clean[name]]), f"other bytes in {other}"
    assert [path.name for path in work.iterdir()] == [NAME], "something was left"


def _ended(made: Fitted, work: Path, stage: str, closed: bool) -> None:
    """A fit that is stopped early while its state is not finite: the last good checkpoint is kept."""
    asked = False
    with _in_step("optimiser", stage, 1, math.nan):
        steps = made.fit(Store(work), NAME, stop=lambda: asked)
        report = next(steps)
        while (report.stage, report.step) != (stage, 2):
            report = next(steps)
        asked = not closed
        with pytest.raises(ImagicError, match=f"1 of {STEPS} steps of stage {stage} are saved") as error:
            steps.close() if closed else next(steps)
    _check_advice(error.value)
    _check_finite(work)
    newest = Checkpoints(Store(work).checkpoints(NAME)).newest()
    assert newest
    assert (newest.record.stage, newest.record.step) == (stage, 1)


def _check_advice(error: ImagicError) -> None:
    assert any(word in error.remedy for word in ("--dtype", "learning")), f"no advice: {error}"


def _check_finite(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        for name, value in load_file(path).items():
            assert not value.is_floating_point() or value.isfinite().all(), f"{name} in {path} is not finite"


@contextmanager
def _in_step(place: str, stage: str, k: int, value: float) -> Iterator[None]:
    """Injects a value into one place of one step."""
    step = Stage.step

    def wrong(self: Stage, at: int) -> StepReport:
        if (self.name, at) != (stage, k):
            return step(self, at)
        name, parameter = next(iter(self.trainables.items()))
        loss = stages.denoising_loss
        if place == "latents":
            self.latents.view(-1)[17] = value
        hook = parameter.register_hook(lambda gradient: gradient + (value if place == "gradients" else 0))
        with patch.object(stages, "denoising_loss", lambda *given: loss(*given) + (value if place == "loss" else 0)):
            report = step(self, at)
        hook.remove()
        if place == "weights":
            parameter.data.view(-1)[-1] = value
        elif place == "optimiser":
            optimizer, held = self.updates.optimizer_of(name)
            optimizer.state[held]["exp_avg_sq"].view(-1)[3] = value
        return report

    with patch.object(Stage, "step", wrong):
        yield


@contextmanager
def _in_weights(method: str, value: float) -> Iterator[None]:
    """Injects a value into the trained weights, before a run writes its files or generates its preview."""
    plain = getattr(run.Run, method)

    def wrong(self: run.Run, *given: Any) -> Any:
        trained = [p for name, p in self.base.denoiser.named_parameters() if "lora" in name] or list(self.base.denoiser.parameters())
        trained[0].data.view(-1)[0] = value
        return plain(self, *given)

    with patch.object(run.Run, method, wrong):
        yield


@contextmanager
def _in_embedding(value: float) -> Iterator[None]:
    plain = run.save_embeddings

    def wrong(writer: Any, named: dict[str, Conditioning], *shape: Any) -> None:
        tokens = named["optimised"].tokens.clone()
        tokens.view(-1)[0] = value
        plain(writer, named | {"optimised": Conditioning(tokens)}, *shape)

    with patch.object(run, "save_embeddings", wrong):
        yield


@contextmanager
def _in_checkpoint(value: float) -> Iterator[None]:
    """Injects a value into the state that stage tune saves."""
    plain = Stage.state_dict

    def wrong(self: Stage) -> dict[str, torch.Tensor]:
        state = plain(self)
        return {name: torch.full_like(tensor, value) for name, tensor in state.items()} if self.name == "tune" else state

    with patch.object(Stage, "state_dict", wrong):
        yield


def _changed(path: Path, value: float) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[-1:].fill_(value)
    save_file(tensors, path, metadata)


def _opened(made: Fitted, work: Path, part: str, value: float) -> None:
    shutil.copytree(made.folder, work)
    path = next((work / part).glob("*.safetensors"))
    _changed(path, value)
    with pytest.raises(ImagicError, match=part):
        opened(work)


def _loaded(made: Fitted, work: Path, mode: Mode, file: str, value: float) -> None:
    """An adapter with a value that is not finite and correct hashes is rejected when it is loaded."""
    shutil.copytree(made.store.root / mode, work / mode)
    _changed(work / mode / file, value)
    forged(work / mode)
    adapter, before = Store(work).read(mode), weights(made.base.denoiser)
    with pytest.raises(ImagicError, match=file):
        list(Editor(made.base).edit(adapter, [0.5], [0], made.config(mode).edit))
    assert same(before, weights(made.base.denoiser)), "the base has changed"
