"""A fit that is stopped, closed or killed resumes to the same bytes as an uninterrupted one; other runs are rejected."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import PROMPT, SimulatedProcess, each, opened, output, slow_but, tiny_config
from files import rival
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.record import RECORD, STEPS
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning, NotFinite, Stopped
from imagic_lora.core.settings.merging import merged
from imagic_lora.memory.limits import gib
from imagic_lora.memory.out_of_memory import assumed_from
from imagic_lora.memory.prediction import predict
from imagic_lora.training.fit import fit, result
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.resuming.checkpoints import CHECKPOINT, STATE, Checkpoints
from imagic_lora.training.stage import Stage, StepReport

EMBED, TUNE = 2, 3
REPORTS = [*(("embed", k + 1) for k in range(EMBED)), *(("tune", k + 1) for k in range(TUNE))]
LEVERS = {"gradient_checkpointing": True, "optimizer_in_backward": True, "idle": "release"}


@dataclass(frozen=True)
class Kind:
    """A way to train."""

    mode: Mode
    memory: tuple[tuple[str, Any], ...] = ()


KINDS = {
    "lora": Kind("lora"),
    "full": Kind("full"),
    "lora in 8 bits": Kind("lora", (("optimizer", "adam8bit"),)),
    "full in 8 bits": Kind("full", (("optimizer", "adam8bit"),)),
    "embedding": Kind("embedding"),
    "full by Adafactor": Kind("full", (("optimizer", "adafactor"),)),
    "stochastic": Kind("full", (("dtype", "bf16"), ("master_weights", "bf16-stochastic"), ("optimizer_in_backward", True))),
}
LORA, FULL, EMBEDDING = KINDS["lora"], KINDS["full"], KINDS["embedding"]


def reports(kind: Kind) -> list[tuple[str, int]]:
    """The steps of a whole fit."""
    return REPORTS[:EMBED] if kind == EMBEDDING else REPORTS


Bases = Callable[..., Base]
Undisturbed = Callable[..., Adapter]
HalfWay = Callable[[Kind, int], "Fitting"]


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with tensors of 4,096 elements and more, whose states 8 bits are for."""
    return save_tiny(tmp_path_factory.mktemp("large") / "base", width=64)


def opened_bases(large: Path) -> Bases:
    """Gives the base of a kind of training, opened once."""

    @cache
    def base(kind: Kind, levers: tuple[tuple[str, Any], ...] = ()) -> Base:
        return opened(large, kind.mode, **dict(kind.memory + levers))

    return base


@pytest.fixture
def bases(large: Path) -> Bases:
    """Bases of one test: what it interrupts or patches reaches no other."""
    return opened_bases(large)


class Fitting:
    """Fits of one name in one store."""

    def __init__(self, root: Path, folder: Path, photo: Path, bases: Bases) -> None:
        self.store, self.folder, self.photo, self.bases = Store(root), folder, photo, bases
        self.saved = Checkpoints(self.store.checkpoints("one"))
        self.done: list[tuple[str, int]] = []

    def config(self, kind: Kind = LORA, **changes: Any) -> RunConfig:
        """Some steps of each stage; in mode lora of a rank that 8 bits are for."""
        tune = {} if kind == EMBEDDING else {"steps": TUNE} | ({"rank": 64, "targets": "attention"} if kind.mode == "lora" else {})
        return tiny_config(self.folder, kind.mode, **merged({"embed": {"steps": EMBED}, "tune": tune}, changes))

    def start(self, kind: Kind = LORA, changes: dict[str, Any] | None = None, prompt: str = PROMPT, **options: Any) -> Iterator[StepReport]:
        """A fit, not yet begun."""
        base = options.pop("base", None) or self.bases(kind)
        photo = options.pop("photo", self.photo)
        self.done.clear()
        return fit(photo, prompt, self.config(kind, **(changes or {})), self.store, "one", base=base, **options)

    def run_stage(self, steps: Iterator[StepReport]) -> list[tuple[str, int]]:
        """Runs a fit as far as it goes; gives the steps done."""
        for report in steps:
            self.done.append((report.stage, report.step))
        return self.done

    def run(self, kind: Kind = LORA, **options: Any) -> list[tuple[str, int]]:
        """A fit that goes to its end."""
        return self.run_stage(self.start(kind, **options))

    def stop_after(self, steps: int, kind: Kind = LORA, **options: Any) -> str:
        """A fit that is asked to stop after so many steps; gives what it said."""
        with pytest.raises(Stopped) as caught:
            self.run(kind, stop=lambda: len(self.done) >= steps, **options)
        assert len(self.done) == steps
        assert self.store.names() == []
        return str(caught.value)

    def files(self) -> dict[str, bytes]:
        """Every file of the adapter but its record."""
        return files(self.store.read("one"))

    def there(self) -> list[str]:
        """All that is in the store, and the checkpoints."""
        folders = [path for path in (self.store.root, self.saved.folder) if path.is_dir()]
        return sorted(path.name for folder in folders for path in folder.iterdir() if path != self.saved.folder)


def files(adapter: Adapter) -> dict[str, bytes]:
    """Every file of an adapter but its record, which says when it was made."""
    found = {path.relative_to(adapter.folder).as_posix(): path.read_bytes() for path in adapter.folder.rglob("*") if path.is_file()}
    del found[RECORD]
    return found


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power does not fail here, and flushing takes its time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def fitting(tmp_path: Path, large: Path, photo_file: Path, bases: Bases) -> Fitting:
    """Fits in a store of their own."""
    return Fitting(tmp_path / "store", large, photo_file, bases)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, large: Path, photo_file: Path) -> Undisturbed:
    """Gives the adapter of a kind of training that nothing disturbed."""

    @cache
    def make(kind: Kind = LORA) -> Adapter:
        one = Fitting(tmp_path_factory.mktemp("undisturbed"), large, photo_file, opened_bases(large))
        assert one.run(kind) == reports(kind)
        assert one.there() == ["one"]
        return one.store.read("one")

    return make


# Going on


@pytest.mark.parametrize(
    ("kind", "steps"),
    slow_but(
        [("lora", EMBED + 1), ("lora in 8 bits", EMBED + 1), ("full", EMBED + 1), ("embedding", 1)],
        [
            *(("lora", steps) for steps in (1, EMBED, EMBED + 1, len(REPORTS))),  # inside a stage, at its end, in the next one, at the end
            ("full", EMBED + 1),
            ("lora in 8 bits", 1),
            ("lora in 8 bits", EMBED + 1),
            ("full in 8 bits", EMBED + 2),
            ("stochastic", EMBED + 1),
            ("embedding", 1),
            ("embedding", EMBED),
        ],
    ),
)
def test_resume_after_a_stop_gives_the_same_bytes(fitting: Fitting, undisturbed: Undisturbed, kind: Any, steps: int) -> None:
    """Every file of the adapter is equal; the message says what is saved, no step is repeated, and nothing else is left."""
    kind = KINDS[kind]
    stage, step = REPORTS[steps - 1]
    message = fitting.stop_after(steps, kind)
    assert message == (
        f"{step} of {EMBED if stage == 'embed' else TUNE} steps of stage {stage} are saved; run the same command with --resume to continue"
    )
    assert fitting.store.unfinished() == ["one"]
    assert fitting.run(kind, resume=True) == reports(kind)[steps:]
    assert fitting.files() == files(undisturbed(kind))
    assert fitting.there() == ["one"]
    found, expected = fitting.store.read("one").record, undisturbed(kind).record
    assert found.losses == expected.losses
    assert set(found.seconds) == set(expected.seconds) == {stage for stage, _ in reports(kind)}


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if "8 bits" in name], ids=["lora", "full"])
def test_states_of_8_bits_are_saved_as_they_are(fitting: Fitting, kind: Kind) -> None:
    """Bytes, where a tensor is large enough; without the tables that all share."""
    fitting.stop_after(EMBED + 1, kind)
    newest = fitting.saved.newest()
    assert newest is not None
    found = {name: value.dtype for name, value in newest.tensors.items() if name.startswith("optimizer/")}
    assert torch.uint8 in {dtype for name, dtype in found.items() if name.endswith("/state1")}
    assert torch.float32 in {dtype for name, dtype in found.items() if name.endswith("/state1")}
    assert not any("qmap" in name for name in found)


@pytest.mark.parametrize(
    ("kind", "close"), [(LORA, True), pytest.param(KINDS["stochastic"], False, marks=pytest.mark.slow)], ids=["closed", "stopped"]
)
def test_a_resume_after_every_step_gives_the_same_bytes(fitting: Fitting, undisturbed: Undisturbed, kind: Kind, close: bool) -> None:
    """Stopped after every step in turn, or closed as a caller does who needs no more steps."""
    for report in REPORTS:
        resume = report != REPORTS[0]
        if close:
            run: Any = fitting.start(kind, resume=resume)
            first = next(run)
            assert (first.stage, first.step) == report
            run.close()
        else:
            fitting.stop_after(1, kind, resume=resume)
            assert fitting.done == [report]
    assert fitting.run(kind, resume=True) == []
    assert fitting.files() == files(undisturbed(kind))


def test_a_base_of_its_own_goes_on_to_the_same_bytes(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """Opened anew each time, as a program does that was started anew."""
    config = fitting.config(FULL)
    run: Any = fit(fitting.photo, PROMPT, config, fitting.store, "one")
    for _ in range(EMBED + 1):
        next(run)
    run.close()
    made = result(fit(fitting.photo, PROMPT, config, fitting.store, "one", resume=True))
    assert made is not None
    assert files(made) == files(undisturbed(FULL))


class Killed(BaseException):
    """Nothing runs any more."""


@contextmanager
def stepping(step: Callable[[Stage, int], StepReport]) -> Iterator[None]:
    """Every step is made by this function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "step", step)
        yield


def kill(fitting: Fitting, at: tuple[str, int], **options: Any) -> None:
    """A fit that is killed in this step."""
    real = Stage.step

    def step(self: Stage, k: int) -> StepReport:
        if (self.name, k + 1) == at:
            raise Killed
        return real(self, k)

    with stepping(step), pytest.raises(Killed):
        fitting.run(**options)


@pytest.mark.parametrize(
    ("every", "killed", "kept"),
    [
        ({}, ("embed", 3), []),
        ({}, ("tune", 5), ["embed-000003"]),
        ({"steps": 2}, ("embed", 3), ["embed-000002"]),
        ({"steps": 2}, ("tune", 4), ["embed-000003", "tune-000002"]),
        ({"steps": 2}, ("tune", 5), ["embed-000003", "tune-000004"]),
        ({"seconds": 1e-9}, ("tune", 4), ["embed-000003", "tune-000003"]),
    ],
    ids=str,
)
def test_killed_it_goes_on_from_what_was_saved_last(
    fitting: Fitting, every: dict[str, Any], killed: tuple[str, int], kept: list[str]
) -> None:
    """At the end of a stage, and as often as was asked for."""
    changes = {"checkpoint": every, "embed": {"steps": 3}, "tune": {"steps": 5}}
    kill(fitting, killed, changes=changes)
    assert fitting.there() == kept
    assert fitting.store.unfinished() == ["one"] * bool(kept)
    if kept:
        run: Any = fitting.start(changes=changes, resume=True)
        first = next(run)
        stage, step = kept[-1].split("-")
        assert (first.stage, first.step) == (("tune", 1) if kept[-1] == "embed-000003" else (stage, int(step) + 1))


def test_killed_it_goes_on_to_the_same_bytes(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """In either stage, again and again; steps that were taken twice are in the history once."""
    every = {"checkpoint": {"steps": 2}}
    for k, killed in enumerate([("tune", 1), ("tune", 2), ("tune", 3)]):
        kill(fitting, killed, changes=every, resume=k > 0)
    assert fitting.run(changes=every, resume=True) == [("tune", 3)]
    lines = [json.loads(line) for line in fitting.files()[STEPS].decode().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == REPORTS
    assert fitting.files() == files(undisturbed())


@pytest.mark.parametrize("kind", slow_but([KINDS["lora in 8 bits"]], [FULL, KINDS["lora in 8 bits"]]), ids=["full", "lora in 8 bits"])
def test_a_fit_resumes_with_other_levers(fitting: Fitting, bases: Bases, undisturbed: Undisturbed, kind: Kind) -> None:
    """With those that do not change the numbers it comes to the same bytes: with and without them by turns, in either stage."""
    levers = bases(kind, tuple(LEVERS.items()))
    fitting.stop_after(1, kind)
    fitting.stop_after(EMBED, kind, base=levers, resume=True)
    fitting.stop_after(1, kind, resume=True)
    assert fitting.run(kind, base=levers, resume=True) == REPORTS[EMBED + 2 :]
    assert fitting.files() == files(undisturbed(kind))


def test_from_the_embedding_it_goes_on_to_anything(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """Once stage embed is done, another mode is as good as if it had been the first; so is any other setting of stage tune."""
    fitting.stop_after(EMBED)
    before = content(fitting.store.root)
    tune = {"steps": 9, "learning_rate": 0.1, "batch_size": 1, "timesteps": "uniform", "rank": 8, "targets": "attention+conv"}
    run: Any = fitting.start(KINDS["lora in 8 bits"], changes={"tune": tune}, resume=True)
    assert next(run).stage == "tune"
    run.close()
    shutil.rmtree(fitting.saved.folder / "tune-000001")
    assert content(fitting.store.root) == before
    assert fitting.run(FULL, resume=True) == REPORTS[EMBED:]
    assert fitting.files() == files(undisturbed(FULL))


@pytest.mark.parametrize("asked", [3, 4], ids=["before sampling", "while sampling"])
def test_stopped_while_pictures_are_made_it_goes_on_to_the_same_bytes(fitting: Fitting, undisturbed: Undisturbed, asked: int) -> None:
    """Before any step of the sampler, and when it has gone on from there too; nothing is trained again."""
    late, later = count(1), count(2)
    with pytest.raises(Stopped, match=f"^{TUNE} of {TUNE} steps of stage tune are saved"):
        fitting.run(stop=lambda: len(fitting.done) == len(REPORTS) and next(late) >= asked)
    with pytest.raises(Stopped, match=f"^{TUNE} of {TUNE} steps of stage tune are saved"):
        fitting.run(stop=lambda: next(later) >= asked, resume=True)
    assert fitting.there() == ["embed-000002", "tune-000003"]
    assert fitting.run(resume=True) == []
    assert fitting.files() == files(undisturbed())


def test_stopping_leaves_the_base_as_it_was(fitting: Fitting, bases: Bases) -> None:
    """In either stage, and while pictures are made."""
    for kind in (LORA, FULL):
        picture = output(bases(kind))
        for steps in (1, EMBED + 1, len(REPORTS)):
            fitting.stop_after(steps, kind, overwrite=True)
            assert torch.equal(output(bases(kind)), picture)


def test_a_stop_that_is_requested_once_stops_the_fit(fitting: Fitting) -> None:
    """A stage that is not done is never taken for one that is."""
    requested: list[bool] = []
    with pytest.raises(Stopped):
        fitting.run(stop=lambda: len(fitting.done) == 1 and not requested and requested.append(True) is None)


def test_it_goes_on_on_all_processes(fitting: Fitting, bases: Bases) -> None:
    """After the same step; the one that does not write leaves all as it is, a broken checkpoint too."""
    fitting.stop_after(EMBED + 2, processes=SimulatedProcess(0, 2))
    saved = content(fitting.store.root)
    assert fitting.run(resume=True, processes=SimulatedProcess(1, 2)) == REPORTS[EMBED + 2 :]
    (fitting.saved.folder / "tune-000002" / STATE).unlink()
    assert fitting.run(resume=True, processes=SimulatedProcess(1, 2)) == REPORTS[EMBED:]
    assert content(fitting.store.root).keys() == saved.keys() - {".one.checkpoints/tune-000002/state.safetensors"}
    with pytest.warns(ImagicWarning, match="renamed to"):
        assert fitting.run(resume=True, processes=SimulatedProcess(0, 2)) == REPORTS[EMBED:]


def test_another_number_of_threads_warns(fitting: Fitting) -> None:
    """The last digits may differ."""
    fitting.stop_after(1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(
            ImagicWarning, match=f"started on {threads} CPU threads and resumes on {threads + 1}: the last digits of the result may differ"
        ):
            fitting.stop_after(1, resume=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("error", "near"), [(0.01, True), (0.2, False)])
def test_latents_may_differ_by_what_devices_differ(
    fitting: Fitting,
    bases: Bases,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    error: float,
    near: bool,
) -> None:
    """It goes on with those that it began with; others than these are of another VAE."""
    fitting.stop_after(EMBED + 1)
    base = bases(LORA)
    real = base.encode_image
    monkeypatch.setattr(base, "encode_image", lambda pixels: real(pixels) * (1 + error))
    if near:
        fitting.run(resume=True)
        assert fitting.files() == files(undisturbed())
        return
    with pytest.raises(ImagicError, match=r"differs from the one that was interrupted: .*latents of the photo differ"):
        fitting.run(resume=True)


# What is not gone on from


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory, large: Path, photo_file: Path) -> HalfWay:
    """Gives a fit that was stopped after so many steps, to be refused only."""

    @cache
    def stopped(kind: Kind, steps: int) -> Fitting:
        one = Fitting(tmp_path_factory.mktemp("half") / "store", large, photo_file, opened_bases(large))
        one.stop_after(steps, kind)
        return one

    return stopped


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "embed.steps": ({"embed": {"steps": 9}}, "embed.steps was 2, is 9"),
    "embed.learning_rate": ({"embed": {"learning_rate": 0.1}}, "embed.learning_rate was 0.05, is 0.1"),
    "embed.batch_size": ({"embed": {"batch_size": 1}}, "embed.batch_size was 2, is 1"),
    "embed.timesteps": ({"embed": {"timesteps": "uniform"}}, "embed.timesteps was 'stratified', is 'uniform'"),
    "tune.steps": ({"tune": {"steps": 9}}, "tune.steps was 3, is 9"),
    "tune.learning_rate": ({"tune": {"learning_rate": 0.1}}, "tune.learning_rate was 0.01, is 0.1"),
    "tune.batch_size": ({"tune": {"batch_size": 1}}, "tune.batch_size was 2, is 1"),
    "tune.timesteps": ({"tune": {"timesteps": "uniform"}}, "tune.timesteps was 'stratified', is 'uniform'"),
    "tune.rank": ({"tune": {"rank": 8}}, "tune.rank was 64, is 8"),
    "tune.alpha": ({"tune": {"alpha": None}}, "tune.alpha was 2.0, is None"),
    "tune.targets": ({"tune": {"targets": "attention+conv"}}, r"tune.targets was 'attention', is 'attention\+conv'"),
    "resolution": ({"resolution": 16}, r"latents was \[1, 4, 6, 8\], is \[1, 4, 2, 4\]"),
}


@each("name, steps", [(name, steps) for name in CHANGED for steps in (EMBED, EMBED + 1) if steps > EMBED or not name.startswith("tune")])
def test_other_settings_are_refused(half_way: HalfWay, name: str, steps: int) -> None:
    """By name, with both values, and what was saved stays as it was."""
    one = half_way(LORA, steps)
    changes, expected = CHANGED[name]
    before = content(one.store.root)
    with pytest.raises(ImagicError, match=f"this run differs from the one that was interrupted: {expected}[.] "):
        one.run(changes=changes, resume=True)
    assert content(one.store.root) == before


def test_another_photo_prompt_or_base_is_refused(half_way: HalfWay, folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """The error names each by its hash or its text, and names all of several."""
    one = half_way(LORA, EMBED + 1)
    before = content(one.store.root)
    other = tmp_path / "other.png"
    Image.open(photo_file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    sha = r"was '[0-9a-f]{64}', is '[0-9a-f]{64}'"
    with pytest.raises(ImagicError, match=rf"interrupted: photo {sha}\. "):
        one.run(photo=other, resume=True)
    with pytest.raises(ImagicError, match=r"interrupted: prompt was 'a cat', is 'a dog'\. "):
        one.run(prompt="a dog", resume=True)
    with pytest.raises(ImagicError, match=r"interrupted: base was '.+', is '.+'\. "):
        one.run(base=opened(folder), resume=True)
    with pytest.raises(ImagicError, match=rf"interrupted: photo {sha}; prompt was 'a cat', is 'a dog'; seed was 0, is 1\. "):
        one.run(photo=other, prompt="a dog", changes={"seed": 1}, resume=True)
    assert content(one.store.root) == before


@each(
    "kind, memory, steps, expected",
    [
        (LORA, {"dtype": "bf16"}, 1, "precision was 'float32', is 'bfloat16'"),
        (LORA, {"dtype": "bf16"}, EMBED, "precision was 'float32', is 'bfloat16'"),
        (LORA, {"optimizer": "adam8bit"}, 1, "optimizer was 'adam', is 'adam8bit'"),
        (LORA, {"optimizer": "adam8bit"}, EMBED + 1, "optimizer was 'adam', is 'adam8bit'"),
        (LORA, {"quantize": "nf4"}, EMBED + 1, "quantize was 'none', is 'nf4'"),
        (KINDS["stochastic"], {"dtype": "bf16"}, EMBED + 1, "master_weights was 'bf16-stochastic', is 'fp32'"),
    ],
)
def test_levers_that_touch_the_numbers_are_refused(
    half_way: HalfWay, large: Path, kind: Kind, memory: dict[str, Any], steps: int, expected: str
) -> None:
    """Where they touched what was saved."""
    one = half_way(kind, steps)
    before = content(one.store.root)
    with pytest.raises(ImagicError, match=rf"interrupted: {expected}\. "):
        one.run(kind, base=opened(large, kind.mode, **memory), resume=True)
    assert content(one.store.root) == before


def test_a_quantised_base_half_way_through_the_embedding_is_refused(fitting: Fitting, large: Path) -> None:
    """Its answers are others."""
    fitting.stop_after(1)
    with pytest.raises(ImagicError, match="quantize was 'none', is 'nf4'"):
        fitting.run(base=opened(large, quantize="nf4"), resume=True)


def test_another_mode_is_refused_when_it_is_being_tuned(half_way: HalfWay) -> None:
    """LoRA layers are not weights."""
    with pytest.raises(ImagicError, match=r"tune\.mode was 'lora', is 'full'"):
        half_way(LORA, EMBED + 1).run(FULL, resume=True)


def test_from_the_embedding_a_fit_may_end_or_go_on(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """With stage embed done, mode embedding has nothing left to train; one that was stopped inside it goes on to a LoRA adapter."""
    fitting.stop_after(EMBED)
    assert fitting.run(EMBEDDING, resume=True) == []
    assert fitting.files() == files(undisturbed(EMBEDDING))
    fitting.store.remove("one")
    fitting.stop_after(1, EMBEDDING)
    assert fitting.run(resume=True) == REPORTS[1:]
    assert fitting.files() == files(undisturbed())


@each("kind", [LORA, FULL])
def test_mode_embedding_does_not_resume_stage_tune(half_way: HalfWay, kind: Kind) -> None:
    """It has none; nothing is lost."""
    one = half_way(kind, EMBED + 1)
    before = content(one.store.root)
    with pytest.raises(ImagicError, match=r"it was in stage tune, which --mode embedding does not have\. "):
        one.run(EMBEDDING, base=one.bases(kind), resume=True)
    assert content(one.store.root) == before


def test_another_number_of_processes_is_refused(half_way: HalfWay) -> None:
    """They share the noise in another way."""
    with pytest.raises(ImagicError, match="processes was 1, is 2"):
        half_way(LORA, 1).run(resume=True, processes=SimulatedProcess(0, 2))


def test_an_unfinished_fit_is_not_begun_anew_by_accident(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """Without a word it is refused, and all stays; with overwrite it begins anew."""
    fitting.stop_after(EMBED + 1)
    before = content(fitting.store.root)
    with pytest.raises(ImagicError, match=r"an unfinished fit of one is in .*\.one\.checkpoints.*add --resume, or --overwrite"):
        fitting.run()
    assert content(fitting.store.root) == before
    assert fitting.run(overwrite=True) == REPORTS
    assert fitting.files() == files(undisturbed())
    assert fitting.there() == ["one"]


def test_an_unfinished_fit_is_not_given_up_for_one_that_cannot_begin(fitting: Fitting, tmp_path: Path) -> None:
    """Here the photo cannot be read."""
    fitting.stop_after(EMBED + 1)
    before = content(fitting.store.root)
    with pytest.raises(ImagicError, match="cannot be read"):
        fitting.run(photo=tmp_path / "none.png", overwrite=True)
    assert content(fitting.store.root) == before


def test_nothing_to_resume_is_refused(fitting: Fitting) -> None:
    """And nothing is begun, nor left."""
    with pytest.raises(ImagicError, match=r"there is no checkpoint of one to resume.*leave out --resume"):
        fitting.run(resume=True)
    assert fitting.done == []
    assert fitting.there() == []


def test_an_adapter_that_is_being_replaced_stays_until_it_is(fitting: Fitting, undisturbed: Undisturbed) -> None:
    """Through a stop, and a resume that has to say overwrite again."""
    fitting.run(changes={"seed": 1})
    old = fitting.files()
    with pytest.raises(Stopped):
        fitting.run(overwrite=True, stop=lambda: len(fitting.done) > EMBED)
    assert fitting.files() == old
    with pytest.raises(ImagicError, match="exists"):
        fitting.run(resume=True)
    assert fitting.files() == old
    assert fitting.run(resume=True, overwrite=True) == REPORTS[EMBED + 1 :]
    assert fitting.files() == files(undisturbed()) != old
    assert fitting.there() == ["one"]


@pytest.mark.parametrize("file", [STATE, CHECKPOINT])
def test_a_broken_checkpoint_is_renamed_and_the_older_one_used(fitting: Fitting, undisturbed: Undisturbed, file: str) -> None:
    """By name, with a warning; the older one is that of stage embed, and leads to the same bytes."""
    fitting.stop_after(EMBED + 2)
    path = fitting.saved.folder / "tune-000002" / file
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.warns(ImagicWarning, match=r"a broken checkpoint is skipped and renamed to .*tune-000002\.broken"):
        assert fitting.run(resume=True) == REPORTS[EMBED:]
    assert fitting.files() == files(undisturbed())
    assert fitting.there() == ["one"]


FORGED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no latents": lambda tensors: tensors.pop("latents"),
    "no embedding": lambda tensors: tensors.pop("optimised/tokens"),
    "latents of another shape": lambda tensors: tensors.update({"latents": torch.ones(1, 4, 3, 3)}),
    "losses too few": lambda tensors: tensors.update({"losses/embed": torch.ones(1)}),
    "losses without number": lambda tensors: tensors.update({"losses/tune": torch.tensor(1.0)}),
    "losses in rows": lambda tensors: tensors.update({"losses/embed": torch.ones(2, 2)}),
    "losses of another stage": lambda tensors: tensors.update({"losses/decode": torch.ones(1)}),
    "no losses": lambda tensors: tensors.pop("losses/embed"),
    "an embedding of another shape": lambda tensors: tensors.update({"optimised/tokens": torch.ones(1, 2, 3)}),
    "an embedding and more": lambda tensors: tensors.update({"optimised/pooled": torch.ones(1, 2)}),
    "no states": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer/")],
}


@each("change", FORGED)
def test_a_checkpoint_that_does_not_fit_is_refused(
    half_way: HalfWay, fitting: Fitting, change: Callable[[dict[str, Tensor]], object]
) -> None:
    """However good its hashes are."""
    newest = half_way(LORA, EMBED + 1).saved.newest()
    assert newest is not None
    tensors = dict(newest.tensors)
    change(tensors)
    fitting.saved.save(newest.record, tensors)
    with pytest.raises(ImagicError):
        fitting.run(resume=True)


@each("steps", [1, EMBED, EMBED + 1, len(REPORTS)])
def test_a_checkpoint_without_the_inputs_of_its_run_is_refused(half_way: HalfWay, fitting: Fitting, steps: int) -> None:
    """However good its hashes are, in either stage, done or not."""
    newest = half_way(LORA, steps).saved.newest()
    assert newest is not None
    fitting.saved.save(newest.record.model_copy(update={"inputs": {}}), newest.tensors)
    with pytest.raises(
        ImagicError, match=r"this run differs from the one that was interrupted: photo was missing, is '[0-9a-f]{64}'; prompt was"
    ):
        fitting.run(resume=True)


def test_a_checkpoint_goes_on_in_another_store(half_way: HalfWay, fitting: Fitting, undisturbed: Undisturbed) -> None:
    """Where somebody else has written it: it is all that is needed."""
    newest = half_way(LORA, EMBED + 1).saved.newest()
    assert newest is not None
    fitting.saved.save(newest.record, newest.tensors)
    assert fitting.run(resume=True) == REPORTS[EMBED + 1 :]
    assert fitting.files() == files(undisturbed())


def test_where_no_checkpoint_is_whole_nothing_begins(fitting: Fitting) -> None:
    """Silently at least: neither with resume nor without; with overwrite it begins anew."""
    fitting.stop_after(EMBED + 2)
    for path in fitting.saved.folder.iterdir():
        (path / STATE).unlink()
    with pytest.warns(ImagicWarning, match="renamed to"), pytest.raises(ImagicError, match="no intact checkpoint of one to resume"):
        fitting.run(resume=True)
    assert fitting.there() == ["embed-000002.broken", "tune-000002.broken"]
    with pytest.raises(ImagicError, match="no intact checkpoint"):
        fitting.run(resume=True)
    with pytest.raises(ImagicError, match="an unfinished fit of one"):
        fitting.run()
    assert fitting.done == []
    assert fitting.run(overwrite=True) == REPORTS


@pytest.mark.parametrize(("stage", "step", "kind"), [("embed", 1, LORA), ("embed", 2, LORA), ("tune", 1, LORA), ("tune", 2, FULL)])
def test_what_is_not_finite_leaves_the_last_checkpoint(
    fitting: Fitting, undisturbed: Undisturbed, stage: str, step: int, kind: Kind
) -> None:
    """The error says what is saved; nothing that is not finite is on the disk; what was saved leads to the same bytes."""
    every, real = {"checkpoint": {"steps": 1}}, Stage.step

    def poisoned(self: Stage, k: int) -> StepReport:
        report = real(self, k)
        if (self.name, k + 1) == (stage, step):
            with torch.no_grad():
                next(iter(self.trainables.values())).view(-1)[0] = torch.nan
        return report

    with stepping(poisoned), pytest.raises(ImagicError, match=f"stage {stage} is not a finite number") as caught:
        fitting.run(kind, changes=every)
    before = REPORTS.index((stage, step))
    assert fitting.done == REPORTS[:before]
    if not before:
        assert "saved" not in str(caught.value)
        assert fitting.there() == []
        return
    name, number = REPORTS[before - 1]
    assert f"{number} of {EMBED if name == 'embed' else TUNE} steps of stage {name} are saved" in caught.value.got
    for path in fitting.store.root.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert fitting.run(kind, changes=every, resume=True) == REPORTS[before:]
    assert fitting.files() == files(undisturbed(kind))


def test_what_is_not_finite_raises_not_finite(fitting: Fitting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception has a class of its own."""
    monkeypatch.setattr("imagic_lora.training.stage.denoising_loss", lambda *given: denoising_loss(*given) * torch.nan)
    with pytest.raises(NotFinite):
        fitting.run()


def test_what_is_not_finite_when_it_is_closed_is_not_saved(fitting: Fitting) -> None:
    """Something went wrong between two steps: the older checkpoint stays."""
    fitting.stop_after(EMBED + 1)
    before = content(fitting.saved.folder)
    run: Any = fitting.start(resume=True)
    next(run)
    weights = [p for p in fitting.bases(LORA).denoiser.parameters() if p.requires_grad]
    with torch.no_grad():
        weights[0].view(-1)[0] = torch.inf
    with pytest.raises(NotFinite):
        run.close()
    assert content(fitting.saved.folder) == before


# Room, and rivals


def needed(fitting: Fitting, kind: Kind) -> int:
    """Bytes of an adapter, two checkpoints, the photo's file, canvas and preview."""
    base = fitting.bases(kind)
    plan = predict(base.architecture, fitting.config(kind), assumed_from(base.runtime))
    return plan.adapter + 2 * plan.checkpoint + 2**25 + fitting.photo.stat().st_size


@pytest.mark.parametrize(("kind", "resume"), [(FULL, False), (LORA, True), (EMBEDDING, False)], ids=["full", "resumed lora", "embedding"])
def test_a_disk_that_is_too_small_is_refused_before_the_training(
    fitting: Fitting, monkeypatch: pytest.MonkeyPatch, kind: Kind, resume: bool
) -> None:
    """To the byte, with the numbers; what is saved already needs no room again."""
    if resume:
        fitting.stop_after(EMBED + 1, kind)
    there = sum(len(data) for data in content(fitting.saved.folder).values()) if resume else 0
    need = needed(fitting, kind) - there
    free = [need - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    message = rf"^{gib(need - 1)} free on the disk of {fitting.store.root}, and the fit needs {gib(need)} more \(the adapter .* checkpoints"
    with pytest.raises(ImagicError, match=message):
        fitting.run(kind, resume=resume)
    assert fitting.done == []
    free[0] = need
    assert fitting.run(kind, resume=resume)[-1] == reports(kind)[-1]


def test_a_disk_that_is_too_small_is_seen_by_the_process_that_writes(fitting: Fitting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others need none."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert fitting.run(processes=SimulatedProcess(1, 2)) == REPORTS


def test_a_name_that_is_being_fitted_is_refused(fitting: Fitting) -> None:
    """From the first step to the last, in any thread, however it is asked, with the number of the process; other names are free."""
    run: Any = fitting.start()
    next(run)
    found: list[str] = []

    def ask(**options: bool) -> None:
        with pytest.raises(ImagicError) as caught:
            next(fit(fitting.photo, PROMPT, fitting.config(), fitting.store, "one", **options))
        found.append(caught.value.got)

    for options in ({}, {"resume": True}, {"overwrite": True}):
        ask(**options)
        thread = Thread(target=ask, kwargs=options)
        thread.start()
        thread.join()
    assert found == [f"{fitting.store.root / 'one'} is being written by process {os.getpid()}"] * 6
    fitting.store.check_free("two", False)
    run.close()
    fitting.store.check_free("one", False)
    assert fitting.run(resume=True) == REPORTS[1:]


def test_a_name_that_another_process_fits_is_refused(fitting: Fitting) -> None:
    """Before anything is looked at, and nothing of it is touched; when that process is dead, it is free."""
    fitting.stop_after(1)
    before = content(fitting.saved.folder)
    with rival(fitting.store, "one") as process:
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(ImagicError, match=f"is being written by process {process.pid}"):
                fitting.run(**options)
    assert content(fitting.saved.folder) == before
    assert fitting.run(resume=True) == REPORTS[1:]
