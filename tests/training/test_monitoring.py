"""What a fit measures and shows while it trains: relative loss, early stopping, previews, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from common import KINDS, PROMPT, TUNED, SimulatedProcess, each, opened, slow_but, tiny_config
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

import imagic_lora.cli.app as cli
import imagic_lora.training.monitoring.trackers as trackers
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import applied, read_canvas, read_embeddings
from imagic_lora.adapters.record import CONVERGENCE, PREVIEWS, RECORD, STEPS
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.config import EarlyStop, Mode, RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning, Stopped
from imagic_lora.core.noise import noise_at, times_at
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.levers import next_lever
from imagic_lora.memory.prediction import predict
from imagic_lora.training.fit import fit, result
from imagic_lora.training.monitoring.convergence import PAIRS, fixed_losses, no_longer_falls
from imagic_lora.training.monitoring.previews import ROWS, SIDE, Previews, kept_steps
from imagic_lora.training.monitoring.trackers import tracked
from imagic_lora.training.resuming.checkpoints import Checkpoints
from imagic_lora.training.run import Run
from imagic_lora.training.stage import StepReport

NEVER_ENOUGH = {"convergence_every": 1, "patience": 2, "min_improvement": 1.0}  # no evaluation is an improvement by 1
OFF = {"convergence_every": 0}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power does not fail here, and flushing takes its time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Fits:
    """Fits of one photo on one base, in a store of their own."""

    def __init__(self, base: Base, folder: Path, photo: Path, store: Path) -> None:
        self.base, self.folder, self.photo, self.store = base, folder, photo, Store(store)
        self.reports: list[StepReport] = []

    def config(self, mode: Mode = "lora", **monitoring: Any) -> RunConfig:
        return tiny_config(self.folder, mode, monitoring=monitoring)

    def start(self, config: RunConfig, name: str = "one", **options: Any) -> Iterator[StepReport]:
        self.reports = []
        return fit(self.photo, PROMPT, config, self.store, name, base=self.base, **options)

    def run(self, config: RunConfig, name: str = "one", **options: Any) -> list[tuple[str, int]]:
        """Runs a fit as far as it goes; gives the steps done."""
        for report in self.start(config, name, **options):
            self.reports.append(report)
        return [(report.stage, report.step) for report in self.reports]

    def files(self, name: str = "one") -> dict[str, bytes]:
        return files(self.store.read(name))


@pytest.fixture
def fits(folder: Path, photo_file: Path, tmp_path: Path) -> Fits:
    return Fits(opened(folder), folder, photo_file, tmp_path / "store")


def files(adapter: Adapter) -> dict[str, bytes]:
    """Every file of an adapter but its record, which says when it was made."""
    found = {path.relative_to(adapter.folder).as_posix(): path.read_bytes() for path in adapter.folder.rglob("*") if path.is_file()}
    del found[RECORD]
    return found


# The relative loss


def by_diffusers(base: Base, latents: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """The losses of the fixed pairs in fp64, by diffusers' scheduler, one pair at a time."""
    scheduler, unet = DDPMScheduler.from_config(base.scheduler().config), base.denoiser
    losses = []
    for pair, time in enumerate(times_at(seed, "convergence", 0, range(PAIRS), PAIRS, "stratified").tolist()):
        noise = noise_at(seed, "convergence", 0, [pair], tuple(latents.shape[1:]))
        t = torch.tensor([math.floor(time * 1000)])
        noised = scheduler.add_noise(latents, noise, t)
        wanted = scheduler.get_velocity(latents, noise, t) if base.prediction_type == "v_prediction" else noise
        with torch.no_grad():
            found = unet(noised, t, tokens).sample  # pyright: ignore[reportCallIssue]
        losses.append((found.double() - wanted.double()).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", slow_but(["epsilon"], KINDS))
def test_the_relative_loss_is_the_ratio_to_the_frozen_base(folders: dict[str, Path], photo_file: Path, tmp_path: Path, kind: str) -> None:
    """After the last step of each stage, against diffusers in fp64 on the stored adapter; the batch size makes no difference."""
    base = opened(folders[kind])
    fits = Fits(base, folders[kind], photo_file, tmp_path)
    fits.run(fits.config(convergence_every=2))
    found = {report.stage: report.relative_loss for report in fits.reports if report.relative_loss is not None}
    adapter = fits.store.read("one")
    embeddings, latents = read_embeddings(adapter), base.encode_image(read_canvas(adapter).pixels)
    frozen = by_diffusers(base, latents, embeddings["target"].tokens, 0)
    embed = by_diffusers(base, latents, embeddings["optimised"].tokens, 0)
    with applied(adapter, base):
        tune = by_diffusers(base, latents, embeddings["optimised"].tokens, 0)
        one, three = (fixed_losses(base, latents, embeddings["optimised"], 0, size) for size in (1, 3))
    assert found == pytest.approx({"embed": (embed / frozen).mean().item(), "tune": (tune / frozen).mean().item()}, rel=1e-4)
    assert not torch.equal(frozen, embed)
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-7)


def test_it_is_evaluated_as_often_as_asked_and_at_the_end_of_a_stage(fits: Fits) -> None:
    """3 + 4 steps, every 2nd; steps.jsonl and the record have it, and nothing has it where it is off."""
    fits.run(fits.config(convergence_every=2))
    found = [(report.stage, report.step) for report in fits.reports if report.relative_loss is not None]
    assert found == [("embed", 2), ("embed", 3), ("tune", 2), ("tune", 4)]
    adapter = fits.store.read("one")
    lines = [json.loads(line) for line in (adapter.folder / STEPS).read_text().splitlines()]
    rounded = [None if report.relative_loss is None else round(report.relative_loss, 6) for report in fits.reports]
    assert [line.get("relative_loss") for line in lines] == rounded
    assert {name: (one.asked, one.done, one.ended, one.relative_loss) for name, one in adapter.record.stages.items()} == {
        "embed": (3, 3, "steps", rounded[2]),
        "tune": (4, 4, "steps", rounded[6]),
    }
    with Image.open(adapter.folder / CONVERGENCE) as picture:
        assert picture.size == (760, 420)
    fits.run(fits.config(**OFF), "off")
    assert all(report.relative_loss is None for report in fits.reports)
    off = fits.store.read("off")
    assert [one.relative_loss for one in off.record.stages.values()] == [None, None]
    assert CONVERGENCE not in off.record.files


@pytest.mark.parametrize("mode", slow_but(["lora"], TUNED))
def test_monitoring_does_not_change_what_is_trained(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """Weights and embeddings are bit-equal with everything on and everything off; early stopping that never stops is no exception."""
    fits = Fits(opened(folder, mode), folder, photo_file, tmp_path)
    fits.run(fits.config(mode, **OFF), "off")
    fits.run(fits.config(mode, convergence_every=1, preview_every=1, early_stop="both", patience=1000), "on")
    off, on = ({name: content for name, content in fits.files(name).items() if name.endswith(".safetensors")} for name in ("off", "on"))
    assert len(off) == 2
    assert off == on


def test_the_pairs_are_apart_from_the_noise_of_the_training() -> None:
    """No fixed pair has the noise of any early step of a stage."""
    fixed = noise_at(0, "convergence", 0, range(PAIRS), (4,))
    for stage in ("embed", "tune"):
        for step in range(20):
            assert not (noise_at(0, stage, step, range(2), (4,))[:, None] == fixed).all(-1).any()


# Early stopping


@each(
    "values, patience, expected",
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 1.0], 1, True),
        ([1.0, 0.8, 0.6], 1, False),
        ([1.0, 0.8, 0.79, 0.78], 2, True),  # each is lower than the one before, by less than the smallest improvement
        ([1.0, 0.8, 0.77, 0.74], 3, False),  # together they are an improvement
        ([1.0, 0.8, 0.9, 0.7], 2, False),
        ([1.0, 0.8, 0.9, 0.9, 0.9], 3, True),
        ([1.0, 0.8, 0.9, 0.9], 3, False),
    ],
)
def test_when_a_value_no_longer_falls(values: Sequence[float], patience: int, expected: bool) -> None:
    """Patience values in a row that are not lower than the lowest before them by more than 0.05."""
    assert no_longer_falls(values, patience, 0.05) == expected


ENDS: dict[EarlyStop, list[tuple[str, int]]] = {
    "embed": [("embed", 1), ("embed", 2), *(("tune", k) for k in (1, 2, 3, 4))],
    "tune": [*(("embed", k) for k in (1, 2, 3)), ("tune", 1), ("tune", 2)],
    "both": [("embed", 1), ("embed", 2), ("tune", 1), ("tune", 2)],
}


@pytest.mark.parametrize("early_stop", ENDS)
def test_a_stage_ends_when_the_relative_loss_no_longer_falls(fits: Fits, early_stop: EarlyStop) -> None:
    """After as many evaluations as patience says, in the stages that were named; report and record say so."""
    assert fits.run(fits.config(early_stop=early_stop, **NEVER_ENOUGH)) == ENDS[early_stop]
    stages = {"embed", "tune"} if early_stop == "both" else {early_stop}
    assert {report.stage for report in fits.reports if report.early_stop} == stages
    record = fits.store.read("one").record
    for name, asked in (("embed", 3), ("tune", 4)):
        stage = record.stages[name]
        expected = (asked, 2, "early stop") if name in stages else (asked, asked, "steps")
        assert (stage.asked, stage.done, stage.ended) == expected


def test_a_stage_that_improves_goes_on(fits: Fits) -> None:
    """The smallest improvement decides."""
    settings = NEVER_ENOUGH | {"min_improvement": 0.0}
    fits.run(fits.config(convergence_every=1), "free")
    falls = all(later < earlier for earlier, later in pairwise([1.0, *(report.relative_loss or 0 for report in fits.reports)]))
    assert falls, "the tiny base no longer learns in this test"
    assert len(fits.run(fits.config(early_stop="both", **settings))) == 7


@pytest.mark.parametrize("early_stop", [pytest.param("off", marks=pytest.mark.slow), "both"])
def test_a_fit_resumed_after_every_step_gives_the_same_bytes(fits: Fits, early_stop: EarlyStop) -> None:
    """Relative losses, the step where a stage ends, previews and the pictures of both; nothing is left beside the adapter."""
    config = fits.config(early_stop=early_stop, preview_every=1, **(NEVER_ENOUGH if early_stop == "both" else {"convergence_every": 1}))
    steps = fits.run(config, "undisturbed")
    for k, step in enumerate(steps):
        with pytest.raises(Stopped):
            assert fits.run(config, resume=k > 0, stop=lambda: bool(fits.reports)) == [step]
    assert fits.run(config, resume=True) == []
    assert fits.files() == fits.files("undisturbed")
    found, expected = (fits.store.read(name).record for name in ("one", "undisturbed"))
    assert (found.stages, found.losses) == (expected.stages, expected.losses)
    assert fits.store.unfinished() == []


def test_a_fit_that_may_stop_at_another_step_does_not_resume(fits: Fits) -> None:
    """Settings of early stopping count where they decide; of evaluations alone they do not."""
    with pytest.raises(Stopped):
        fits.run(fits.config(convergence_every=1), stop=lambda: bool(fits.reports))
    with pytest.raises(Stopped):
        fits.run(fits.config(convergence_every=2), resume=True, stop=lambda: bool(fits.reports))
    with pytest.raises(ImagicError, match=r"early_stop was missing, is"):
        fits.run(fits.config(early_stop="embed", **NEVER_ENOUGH), resume=True)
    assert fits.run(fits.config(early_stop="tune", **NEVER_ENOUGH), resume=True) == [("embed", 3), ("tune", 1), ("tune", 2)]


FORGED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "values too few": lambda tensors: tensors.update({"convergence/embed/values": torch.ones(1)}),
    "values without steps": lambda tensors: tensors.pop("convergence/embed/steps"),
    "values without the level": lambda tensors: tensors.pop("convergence/frozen"),
    "steps that were not done": lambda tensors: tensors.update({"convergence/embed/steps": torch.tensor([1, 2, 9])}),
    "steps that fall": lambda tensors: tensors.update({"convergence/embed/steps": torch.tensor([2, 1, 3])}),
    "a level of zero": lambda tensors: tensors.update({"convergence/frozen": torch.zeros(PAIRS)}),
    "a level of another shape": lambda tensors: tensors.update({"convergence/frozen": torch.ones(3)}),
    "another name": lambda tensors: tensors.update({"convergence/decode/values": torch.ones(1)}),
    "a strip of a later step": lambda tensors: tensors.update({"previews/000004": tensors["previews/000001"]}),
    "a strip of numbers": lambda tensors: tensors.update({"previews/000001": torch.ones(4, 8, 8, 3)}),
    "a strip too large": lambda tensors: tensors.update({"previews/000001": torch.zeros(4, 8, SIDE + 1, 3, dtype=torch.uint8)}),
    "a strip without a step": lambda tensors: tensors.update({"previews/x": torch.zeros(4, 8, 8, 3, dtype=torch.uint8)}),
}


def test_a_checkpoint_with_other_relative_losses_or_previews_is_refused(fits: Fits) -> None:
    """However good its hashes are; and so is one that says it ended early where its values do not."""
    config = fits.config(convergence_every=1, preview_every=1)
    with pytest.raises(Stopped):
        fits.run(config, stop=lambda: len(fits.reports) == 4)
    saved = Checkpoints(fits.store.checkpoints("one"))
    newest = saved.newest()
    assert newest is not None
    for name, change in FORGED.items():
        tensors = dict(newest.tensors)
        change(tensors)
        saved.save(newest.record, tensors)
        with pytest.raises(ImagicError, match="do not fit this run"):
            fits.run(config, resume=True)
        assert fits.reports == [], name
    finished = {name: value for name, value in newest.tensors.items() if not name.startswith("optimizer/")}
    inputs = {name: value for name, value in newest.record.inputs.items() if name != "optimizer"}
    saved.save(newest.record.model_copy(update={"stopped_early": True, "inputs": inputs}), finished)
    with pytest.raises(ImagicError, match="do not fit this run"):
        fits.run(config, resume=True)
    saved.save(newest.record, newest.tensors)
    assert fits.run(config, resume=True) == [("tune", k) for k in (2, 3, 4)]


# Previews


def test_the_kept_previews_are_few_and_evenly_spread() -> None:
    """Dropped one after the other as they come, they are those that a look at all of them would keep."""
    for every in (1, 5):
        kept: list[int] = []
        for step in range(every, 40 * every * ROWS, every):
            kept = kept_steps([*kept, step], every)
            assert kept[-1] == step
            assert len(kept) <= ROWS + 1
            assert kept == kept_steps(list(range(every, step + 1, every)), every)
            assert len({later - earlier for earlier, later in zip([0, *kept], kept[:-1], strict=False)}) <= 1


def test_previews_are_the_edits_at_that_step(fits: Fits) -> None:
    """The last one shows what the Editor's images show: the adapter keeps a strip of every second step, of etas 0, 0.5, 0.7 and 1."""
    shown: list[Image.Image] = []
    config = fits.config(preview_every=2)
    for report in fits.start(config):
        if report.preview:
            assert report.preview == fits.store.checkpoints("one") / PREVIEWS
            shown.append(Image.open(report.preview).convert("RGB"))
    assert [picture.height for picture in shown] == [34 + rows * (SIDE + 32) for rows in (2, 3)]
    adapter = fits.store.read("one")
    with Image.open(adapter.folder / PREVIEWS) as kept:
        assert kept.convert("RGB").tobytes() == shown[-1].tobytes()
    from imagic_lora.sampling.editor import Editor

    images = [edit.image for edit in Editor(opened(fits.folder)).edit(adapter, [0.0, 0.5, 0.7, 1.0], [0], config.edit)]
    expected = Previews(config)
    expected.add(4, images)
    title_and_photo = 34 + SIDE + 32
    last = shown[-1].crop((0, title_and_photo + SIDE + 32, shown[-1].width, shown[-1].height))
    alone = expected.picture(PROMPT, images[0])
    assert alone is not None
    assert alone.crop((0, title_and_photo, alone.width, alone.height)).tobytes() == last.tobytes()


def test_a_stop_during_a_preview_loses_nothing(fits: Fits) -> None:
    """The step is saved; the preview is made when the fit goes on, and the adapter is the same to the byte."""
    config = fits.config(preview_every=1)
    fits.run(config, "undisturbed")
    calls = count(1)  # two after the steps of stage embed but the last, one after that and one at its end: the next is in the preview
    with pytest.raises(Stopped, match="1 of 4 steps of stage tune are saved"):
        fits.run(config, stop=lambda: len(fits.reports) == 3 and next(calls) == 3)
    assert [(report.stage, report.step, report.preview) for report in fits.reports[3:]] == [("tune", 1, None)]
    assert not (fits.store.checkpoints("one") / PREVIEWS).exists()
    assert fits.run(config, resume=True) == [("tune", k) for k in (2, 3, 4)]
    assert fits.files() == fits.files("undisturbed")


def test_previews_that_do_not_fit_the_memory_are_left_out(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning; what is trained is stored."""
    made, tried = Run.images, []

    def images(self: Run, e_opt: Any, etas: Sequence[float]) -> list[Image.Image]:
        if len(etas) > 2:
            tried.append(etas)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(self, e_opt, etas)

    monkeypatch.setattr(Run, "images", images)
    with pytest.warns(ImagicWarning, match="there are no more previews during this fit: stage preview needs"):
        assert len(fits.run(fits.config(preview_every=1))) == 7
    assert len(tried) == 1
    assert PREVIEWS not in fits.store.read("one").record.files


def test_the_lever_of_previews_is_to_leave_them_out() -> None:
    """Where every other lever is active; it saves all that stage preview needs, and no other stage."""
    run = resolve({"preset": "8gb", "monitoring": {"preview_every": 50}}, {}, RECIPES["sd"])
    base, plan = architecture("sd15"), predict(architecture("sd15"), run)
    assert next_lever(base, run, plan.assumed, "preview") == ("--preview-every 0", plan.needs("preview"))
    assert (next_lever(base, run, plan.assumed, "sample") or ("",))[0] != "--preview-every 0"
    assert "preview" not in predict(base, resolve({"preset": "8gb"}, {}, RECIPES["sd"])).stages


def test_only_the_main_process_makes_previews(fits: Fits) -> None:
    """The other one evaluates the relative loss like the main process, and writes nothing."""
    fits.run(fits.config(convergence_every=1, preview_every=1), processes=SimulatedProcess(1, 2))
    assert all(report.relative_loss is not None and report.preview is None for report in fits.reports)
    assert not fits.store.root.exists()


# TensorBoard


def test_tensorboard_gets_losses_relative_losses_and_previews(fits: Fits, tmp_path: Path) -> None:
    """Of every step; a fit that is stopped and resumed continues the curves."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = fits.config(convergence_every=2, preview_every=2)

    def run(**options: Any) -> None:
        steps: Any = fits.start(config, **options)
        for report in tracked(steps, config, "one", tmp_path / "logs"):
            fits.reports.append(report)

    with pytest.raises(Stopped):
        run(stop=lambda: len(fits.reports) == 5)
    first = list(fits.reports)
    run(resume=True)
    reports = first + fits.reports
    events = accumulator.EventAccumulator(str(tmp_path / "logs/one")).Reload()
    for stage in ("embed", "tune"):
        expected = [(report.step, pytest.approx(report.loss.item())) for report in reports if report.stage == stage]
        assert [(event.step, event.value) for event in events.Scalars(f"{stage}/loss")] == expected
        relative = [(one.step, pytest.approx(one.relative_loss)) for one in reports if one.stage == stage and one.relative_loss]
        assert [(event.step, event.value) for event in events.Scalars(f"{stage}/relative_loss")] == relative
    assert [event.step for event in events.Images("tune/previews")] == [2, 4]
    assert "learning_rate" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_that_is_missing_is_said_before_anything_is_done(
    fits: Fits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With exit code 2 and what to install; a folder for a tracker that is not used is an error too."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    command = ["fit", str(fits.photo), PROMPT, "--base", str(fits.folder), "--device", "cpu"]
    assert cli.main([*command, "--tracker", "tensorboard"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "pip install 'imagic-lora[tensorboard]'" in said
    assert cli.main([*command, "--tracker-dir", "logs"]) == 2
    assert "--tracker-dir logs without --tracker" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [] or {path.name for path in tmp_path.iterdir()} == {"store"}


# The command line


def test_fit_and_show_say_how_a_stage_went(
    fits: Fits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The settings, the relative loss in the progress, the early stop and the previews; then the record."""
    monkeypatch.chdir(tmp_path)
    settings = ["--embed.steps", "4", "--tune.steps", "4", "--edit.steps", "2", "--rank", "2", "--device", "cpu"]
    monitored = ["--convergence-every", "1", "--early-stop", "embed", "--patience", "2", "--min-improvement", "1", "--preview-every", "2"]
    assert cli.main(["fit", str(fits.photo), PROMPT, "--base", str(fits.folder), "--name", "one", *settings, *monitored]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "relative loss every 1 steps, early stop of stage embed after 2 evaluations without 1 less, previews every 2 steps" in said
    assert "embed 2/4 loss" in said
    assert "Stage embed ends after 2 of 4 steps: the relative loss no longer falls" in said
    assert "Previews after step 4: adapters/.one.checkpoints/previews.png" in said
    last = Store(Path("adapters")).read("one").record.stages["tune"].relative_loss
    assert f"relative {last:.2f}" in said
    assert cli.main(["show", "one"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "embed: 2 of 4 steps (early stop: the relative loss no longer fell), relative loss" in shown
    assert f"tune: 4 steps, relative loss {last:.2f}" in shown
    assert cli.main(["show", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["embed"]["ended"] == "early stop"


def test_a_compressed_adapter_keeps_the_pictures(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Plot and previews are of the fit, which is the same."""
    from imagic_lora.adapters.compress import compress

    adapter = result(
        fit(
            photo_file,
            PROMPT,
            tiny_config(folder, "full", monitoring={"preview_every": 4, "convergence_every": 4}),
            Store(tmp_path),
            "full",
        )
    )
    assert adapter is not None
    small = compress(adapter, opened(folder), 2, Store(tmp_path), "small")
    for name in (CONVERGENCE, PREVIEWS):
        assert (small.folder / name).read_bytes() == (adapter.folder / name).read_bytes()
    assert small.record.stages == adapter.record.stages
