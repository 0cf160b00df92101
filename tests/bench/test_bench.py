"""CritterBench: its cases, its scores, its files, its figures, its page and its command."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from common import array, each
from PIL import Image
from rich.console import Console

import imagic_lora.bench.catalogue as catalogue
import imagic_lora.bench.critters as critters
import imagic_lora.bench.page as page
from imagic_lora.bench.cases import KINDS, Case, Kind, case_at, given_mask
from imagic_lora.bench.catalogue import CATALOGUE, budgeted, chosen, defaults, kind_of, names_for
from imagic_lora.bench.critters import Bench, Result
from imagic_lora.bench.metrics import CritterAlignment, pixels
from imagic_lora.bench.page import Table, tables, write_page
from imagic_lora.bench.scores import IDENTITY_LIMIT, Score, Scorer, drift
from imagic_lora.bench.summary import bootstrapped, summarise
from imagic_lora.cli import app as cli
from imagic_lora.cli.console import cells_table
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.core.yaml_files import read_yaml
from imagic_lora.critters import ATTRIBUTES, backdrop, render
from imagic_lora.critters.judge import Judge, Reading
from imagic_lora.critters.scene import IDENTITY, Scene, describe
from imagic_lora.methods.imagic import Imagic
from imagic_lora.methods.method import Context, Cost, EditRequest, EditResult, Method, Passes
from imagic_lora.photos.reading import read_metadata

DIT = RECIPES["critters-dit"]
MANY = [case_at(3, index) for index in range(240)]
SOME = MANY[:8]
"""One of each kind at least: four poses and one of each of the others."""
PHRASES = {
    "place": {"grass": "on the grass", "sand": "on the sand", "snow": "in the snow", "night": "at night"},
    "thing": {"hat": "wearing a hat", "ball": "with a ball"},
}
some_cases = each("case", SOME)


# cases


def test_a_case_is_a_function_of_its_seed_and_number() -> None:
    """Drawn again in another order it is equal, and the global generator is left alone."""
    state = random.getstate()
    assert [case_at(3, index) for index in reversed(range(40))] == MANY[39::-1]
    assert [case.index for case in MANY] == list(range(240))
    assert random.getstate() == state


def test_the_cases_of_the_claimed_seed_are_stored() -> None:
    """The first of seed 7 are the same on every machine."""
    found = [case_at(7, index) for index in range(2)]
    assert [case.prompt for case in found] == ["a sitting dog", "a gray rabbit"]
    assert [case.source.sun for case in found] == [0.08370084381917497, 0.18623891159543315]


def test_no_two_seeds_or_numbers_share_a_photo() -> None:
    """The first 40 of five seeds are 200 different scenes."""
    assert len({case_at(seed, index).source for seed in (0, 1, 7, 8, 70) for index in range(40)}) == 200


@each("cases", [8, 60, 80, 240])
def test_half_of_the_cases_change_the_pose_and_the_others_take_turns(cases: int) -> None:
    """Exactly half, for an even number of cases; of the other kinds none has more than one case more than another."""
    count = Counter(case.kind for case in MANY[:cases])
    others = [count[kind] for kind in ("colour", "place", "thing", "animal")]
    assert count["pose"] == sum(others) == cases // 2
    assert max(others) - min(others) <= 1


def test_the_truth_differs_from_the_photo_in_what_is_asked_and_in_nothing_else() -> None:
    """In every case exactly one field has another value, and it is the one that gives the kind its name."""
    for case in MANY:
        before, after = asdict(case.source), asdict(case.truth)
        assert [name for name in before if before[name] != after[name]] == [case.kind]


def test_a_thing_is_added_and_never_taken_away() -> None:
    """Those cases start without one and ask for a hat or for a ball; other cases have things of all sorts."""
    asked = [(case.source.thing, case.truth.thing) for case in MANY if case.kind == "thing"]
    assert set(asked) == {("none", "hat"), ("none", "ball")}
    assert {case.source.thing for case in MANY if case.kind != "thing"} == {"none", "hat", "ball"}


def test_every_value_but_no_thing_is_asked_for() -> None:
    """All four poses, six colours and so on, over 240 cases."""
    for kind in KINDS:
        assert {getattr(case.truth, kind) for case in MANY if case.kind == kind} == set(ATTRIBUTES[kind]) - {"none"}


def said(text: str) -> dict[str, set[str]]:
    """The values of every attribute that a text names."""
    return {
        name: {value for value in values if re.search(rf"\b{PHRASES.get(name, {}).get(value, value)}\b", text)}
        for name, values in ATTRIBUTES.items()
    }


def test_a_prompt_names_the_animal_and_the_change_and_nothing_else() -> None:
    """The animal is that of the true edit, the value is the asked one, and the article suits the word after it."""
    words = "|".join(value for name in ("animal", "pose", "colour") for value in ATTRIBUTES[name])
    phrases = "|".join(phrase for group in PHRASES.values() for phrase in group.values())
    for case in MANY:
        named = {name: values for name, values in said(case.prompt).items() if values}
        assert named == {"animal": {case.truth.animal}, case.kind: {getattr(case.truth, case.kind)}}
        assert re.fullmatch(rf"(an (?=[aeiou])|a (?![aeiou]))({words})( ({words}))?( ({phrases}))?", case.prompt), case.prompt
        assert case.source_prompt in {describe(case.source, {case.kind}, pose_first) for pose_first in (False, True)}
        assert (case.source_prompt.split()[1] in ATTRIBUTES["pose"]) == (case.prompt.split()[1] in ATTRIBUTES["pose"])
    starts = [case.prompt.split()[:2] for case in MANY]
    assert ["an", "orange"] in starts
    poses = [word in ATTRIBUTES["pose"] for (_, word), case in zip(starts, MANY, strict=True) if case.kind == "pose"]
    assert 30 < sum(poses) < 90


# scores


@pytest.fixture(scope="module")
def clip() -> CritterAlignment:
    return CritterAlignment.load()


@pytest.fixture(scope="module")
def scorer(clip: CritterAlignment) -> Scorer:
    return Scorer(Judge.load(), clip)


def extreme(scene: Scene) -> Scene:
    """The same animal in the same pose under another light: its identity is lost by more than one standard deviation."""
    light = {"sun": float(scene.sun < 0.5), "horizon": 34.0 if scene.horizon > 39 else 44.0, "tint": -1.0 if scene.tint > 0 else 1.0}
    return replace(scene, **light)


@some_cases
def test_the_true_edit_is_a_success(scorer: Scorer, case: Case) -> None:
    """Its own picture has every score at its best: PSNR at its cap of 100 dB, no distance anywhere."""
    score = scorer.score(case, render(case.truth))
    assert (score.aligned, score.kept, score.attributes, score.success, score.changed) == (True, True, True, True, [])
    assert (score.background, score.psnr) == (0, 100)
    assert score.identity is not None
    assert score.identity < IDENTITY_LIMIT
    assert (score.ssim, score.clip) == (pytest.approx(1, abs=1e-3), pytest.approx(0, abs=1e-5))


@some_cases
def test_the_photo_keeps_everything_and_is_no_edit(scorer: Scorer, case: Case) -> None:
    """What was asked for is not among what is missed as unchanged."""
    score = scorer.score(case, render(case.source))
    assert (score.aligned, score.kept, score.attributes, score.success, score.changed) == (False, True, False, False, [])
    assert score.psnr < 40
    assert score.clip > 0.001


@some_cases
def test_another_attribute_that_changed_is_named(scorer: Scorer, case: Case) -> None:
    """Whichever it is, the edit is aligned and neither kept nor a success, and its attributes are not the asked ones."""
    for name in ATTRIBUTES:
        if name != case.kind:
            value = next(value for value in reversed(ATTRIBUTES[name]) if value != getattr(case.truth, name))
            score = scorer.score(case, render(case.truth.edited(**{name: value})))
            assert name in score.changed
            assert set(score.changed) <= {name, "identity"}
            assert (score.aligned, score.kept, score.attributes, score.success) == (True, False, False, False)


@some_cases
def test_another_identity_is_named(scorer: Scorer, case: Case) -> None:
    """The same attributes under another light are aligned, not kept and no success; its attributes are as asked."""
    score = scorer.score(case, render(extreme(case.truth)))
    assert score.changed == ["identity"]
    assert score.identity is not None
    assert score.identity > 2 * IDENTITY_LIMIT
    assert (score.aligned, score.kept, score.attributes, score.success) == (True, False, True, False)


@some_cases
def test_an_animal_that_turned_round_is_named(scorer: Scorer, case: Case) -> None:
    """It has no distance, and is not kept; its attributes are as asked."""
    turned: Any = -case.truth.facing
    score = scorer.score(case, render(replace(case.truth, facing=turned)))
    assert (score.changed, score.identity) == (["facing"], None)
    assert (score.aligned, score.kept, score.attributes, score.success) == (True, False, True, False)


class Pretending(Judge):
    """A judge that reads a given scene in every image."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        facts = asdict(scene)
        self.sight = Reading({name: facts[name] for name in ATTRIBUTES}, scene.facing, {name: float(facts[name]) for name in IDENTITY})

    def read_scenes(self, pictures: torch.Tensor) -> list[Reading]:
        return [self.sight] * len(pictures)


@each("share, kept", [(0.99, True), (1.01, False)])
def test_the_identity_is_kept_up_to_its_limit(clip: CritterAlignment, share: float, kept: bool) -> None:
    """Just within it is the same animal, just beyond it is another; the distance is reported either way."""
    case = SOME[0]
    off = share * IDENTITY_LIMIT * 8**0.5 * IDENTITY["tint"]  # one factor of eight makes the root of an eighth
    score = Scorer(Pretending(replace(case.truth, tint=case.truth.tint + off)), clip).score(case, render(case.truth))
    assert score.identity == pytest.approx(share * IDENTITY_LIMIT)
    assert (score.kept, score.changed) == (kept, [] if kept else ["identity"])


def test_all_that_changed_is_named_at_once(clip: CritterAlignment) -> None:
    """Two attributes and the facing, but never what was asked for."""
    case = SOME[0]
    other: Any = {"colour": "blue" if case.truth.colour != "blue" else "gray", "place": "snow" if case.truth.place != "snow" else "sand"}
    seen = replace(case.source, facing=-case.truth.facing, **other)
    assert Scorer(Pretending(seen), clip).score(case, render(case.truth)).changed == ["colour", "place", "facing"]


def test_distances_to_the_true_edit_are_the_usual_ones(scorer: Scorer, clip: CritterAlignment) -> None:
    """PSNR by its formula on 0 to 255; the CLIP distance is one less the cosine of the model's own image embeddings."""
    case = SOME[0]
    truth, picture = render(case.truth), off_by(render(case.truth), 10)
    score = scorer.score(case, picture)
    assert score.psnr == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    assert 0 < score.ssim < 1
    ids = clip.tokenizer(["a dog"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = clip.clip(input_ids=ids, pixel_values=pixels([picture, truth])).image_embeds
    assert score.clip == pytest.approx(1 - (a @ b / a.norm() / b.norm()).item(), abs=1e-5)


def off_by(picture: Image.Image, levels: int) -> Image.Image:
    """A picture every value of which is that many levels off, up or down."""
    values = array(picture)
    return Image.fromarray(np.where(values + levels <= 255, values + levels, values - levels).astype(np.uint8))


@some_cases
def test_drift_is_the_root_mean_square_of_the_background(case: Case) -> None:
    """Nothing for the true edit and for its empty backdrop, and 13 levels where all values are 13 levels off."""
    assert drift(case, render(case.truth)) == drift(case, backdrop(case.truth)) == 0
    assert drift(case, off_by(render(case.truth), 13)) == pytest.approx(13)


@some_cases
def test_drift_looks_past_the_animal_wherever_it_is_or_was(case: Case) -> None:
    """Noise over the animal of the photo, or over that of the true edit, does not count; one pixel elsewhere does."""
    draw = np.random.default_rng(0)
    covered = np.zeros((64, 64), dtype=bool)
    for scene in (case.source, case.truth):
        animal = (array(render(scene)) != array(backdrop(scene))).any(2)
        noisy = np.where(animal[..., None], draw.integers(0, 256, (64, 64, 3)), array(backdrop(case.truth)))
        assert drift(case, Image.fromarray(noisy.astype(np.uint8))) == 0
        covered |= animal
    behind = array(backdrop(case.truth))
    row, column = np.argwhere(~covered)[500]
    behind[row, column] = (behind[row, column] + 60) % 120
    error = np.square(behind[row, column] - array(backdrop(case.truth))[row, column]).sum() / (3 * (~covered).sum())
    assert drift(case, Image.fromarray(behind.astype(np.uint8))) == pytest.approx(error**0.5)


def worth(aligned: bool = True, changed: Sequence[str] = (), **values: Any) -> Score:
    """A score made by hand."""
    plain = {"identity": 0.2, "background": 5.0, "psnr": 20.0, "ssim": 0.5, "clip": 0.1} | values
    return Score(aligned=aligned, kept=not changed, changed=list(changed), **plain)


@each(
    "aligned, changed, attributes, success",
    [
        (True, [], True, True),
        (True, ["identity"], True, False),
        (True, ["facing"], True, False),
        (True, ["colour"], False, False),
        (True, ["colour", "identity"], False, False),
        (False, [], False, False),
        (False, ["identity"], False, False),
    ],
)
def test_attributes_forgive_the_identity_and_nothing_else(aligned: bool, changed: list[str], attributes: bool, success: bool) -> None:
    """They and the success both need the asked change; the success needs all the rest besides."""
    score = worth(aligned, changed)
    assert (score.attributes, score.success) == (attributes, success)


# the run and its files


class Painter(Method):
    """Gives the true edit off by some levels, and keeps a line for each call; fails on some cases while its file of troubles is there."""

    name, rows = "painter", ("plain", "bright")

    def __init__(self, log: Path, levels: int = 4, fails: Sequence[int] = (), seed: int = 5) -> None:
        self.log, self.fails, self.seed = log, fails, seed
        self.settings = {"levels": levels}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{request.seed}\n")
        yield EditResult("plain", request.photo, Cost())
        if request.seed in self.fails:
            raise ValueError(f"odd weather in case {request.seed}")
        truth = render(case_at(self.seed, request.seed).truth)
        yield EditResult("bright", off_by(truth, self.settings["levels"]), Cost(3, 2, 1.5, 7))

    def passes(self, base: Any) -> dict[str, Passes]:
        return {"plain": Passes(0), "bright": Passes(3, 2)}

    def calls(self) -> list[int]:
        """The cases since this was last asked."""
        found = [int(line) for line in self.log.read_text(encoding="utf-8").split()] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found


class Copier(Method):
    """Gives the photo."""

    name, rows, settings = "copier", ("copied",), {}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        yield EditResult("copied", request.photo, Cost())

    def passes(self, base: Any) -> dict[str, Passes]:
        return {"copied": Passes(0)}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> None:
    """No base is loaded: these methods need none."""
    nothing: Any = None
    monkeypatch.setattr(critters, "_context", lambda folder: (Context(nothing), scorer))


@pytest.fixture
def painter(tmp_path: Path) -> Painter:
    return Painter(tmp_path / "calls")


def by_case(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda one: (one.case, one.method))


@pytest.mark.usefixtures("cheap")
def test_a_result_without_its_picture_is_made_again(painter: Painter, tmp_path: Path) -> None:
    """The page needs it."""
    bench = Bench(5, 1, [painter], tmp_path / "out")
    list(bench.results())
    (bench.folder(0) / "bright.png").unlink()
    list(bench.results())
    assert (bench.folder(0) / "bright.png").is_file()


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("row", ["copied", "Bright", "source"])
def test_two_rows_never_share_a_picture(row: str, painter: Painter, tmp_path: Path) -> None:
    """Nor one of the photo, also on a file system that does not tell upper from lower case."""

    class Other(Copier):
        name, rows = "other", (row,)

    with pytest.raises(ImagicError, match=f"2 rows of the benchmark have the name {row.lower()}"):
        list(Bench(5, 1, [painter, Copier(), Other()], tmp_path / "out").results())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cheap")
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(painter: Painter, tmp_path: Path) -> None:
    """In a case of an earlier run, or in place of the folder of the cases."""
    bench = Bench(5, 2, [painter], tmp_path / "out")
    (bench.folder(1) / "bright.png").mkdir(parents=True)
    with pytest.raises(ImagicError, match=r"bright\.png is not a file"):
        list(bench.results())
    assert not bench.folder(0).exists()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cases").touch()
    with pytest.raises(ImagicError, match="cases cannot be written to"):
        list(bench.results())


@pytest.mark.usefixtures("cheap")
def test_two_seeds_may_share_a_folder(painter: Painter, tmp_path: Path) -> None:
    """Each keeps its photos and its results."""
    first, second = (Bench(seed, 1, [painter], tmp_path / "out") for seed in (5, 6))
    list(first.results())
    photo = (first.folder(0) / "source.png").read_bytes()
    list(second.results())
    assert (first.folder(0) / "source.png").read_bytes() == photo != (second.folder(0) / "source.png").read_bytes()


@pytest.mark.usefixtures("cheap")
def test_a_run_leaves_pictures_and_results_in_files(painter: Painter, tmp_path: Path) -> None:
    """For each case: the photo, the true edit, a picture of every row that says what it is, and one file of scores."""
    bench = Bench(5, 2, [painter, Copier()], tmp_path / "out")
    results = list(bench.results())
    assert [(one.case, one.method, list(one.rows), one.error) for one in by_case(results)] == [
        (case, *rest) for case in range(2) for rest in (("copier", ["copied"], None), ("painter", ["plain", "bright"], None))
    ]
    for index in range(2):
        case, folder = case_at(5, index), bench.folder(index)
        assert folder == tmp_path / "out" / "cases" / f"5-000{index}"
        expected = {"source": render(case.source), "truth": render(case.truth), "copied": render(case.source)}
        expected |= {"plain": render(case.source), "bright": off_by(render(case.truth), 4)}
        assert {path.name for path in folder.iterdir()} == {*(f"{name}.png" for name in expected), "painter.json", "copier.json"}
        for name, picture in expected.items():
            with Image.open(folder / f"{name}.png") as stored:
                assert np.array_equal(array(stored), array(picture))
        assert read_metadata(folder / "bright.png") == {"case": index, "seed": 5, "text": case.prompt}
    bright = next(one for one in results if one.method == "painter").rows["bright"]
    assert (bright[0].background, bright[1]) == (pytest.approx(4), Cost(3, 2, 1.5, 7))


@pytest.mark.usefixtures("cheap")
def test_methods_see_the_source_prompt_and_never_the_true_edit(tmp_path: Path) -> None:
    """The request has the photo, both prompts and the seed; its pictures are none but the photo."""
    seen: list[EditRequest] = []

    class Looking(Copier):
        def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
            seen.append(request)
            return super().edit(context, request)

    list(Bench(5, 2, [Looking()], tmp_path).results())
    for index, request in enumerate(seen):
        case = case_at(5, index)
        assert (request.target_prompt, request.source_prompt, request.seed) == (case.prompt, case.source_prompt, index)
        assert [value for value in vars(request).values() if isinstance(value, Image.Image)] == [request.photo]
        assert np.array_equal(array(request.photo), array(render(case.source)))


@pytest.mark.usefixtures("cheap")
def test_a_second_run_does_nothing_again(painter: Painter, tmp_path: Path) -> None:
    """It gives equal results, and only the cases that are new are done."""
    first = list(Bench(5, 2, [painter], tmp_path).results())
    assert sorted(painter.calls()) == [0, 1]
    assert by_case(list(Bench(5, 2, [painter], tmp_path).results())) == by_case(first)
    assert painter.calls() == []
    assert len(list(Bench(5, 3, [painter, Copier()], tmp_path).results())) == 6
    assert painter.calls() == [2]


@pytest.mark.usefixtures("cheap")
@each("change", ["settings", "seed", "rows", "weights", "limit"])
def test_what_a_result_depends_on_makes_it_run_again(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Other settings, cases or rows of the method, other weights, or another limit to the identity."""
    list(Bench(5, 1, [painter], tmp_path).results())
    painter.calls()
    seed, levels = 6 if change == "seed" else 5, 9 if change == "settings" else 4
    if change == "rows":
        monkeypatch.setattr(Painter, "rows", ("bright", "plain"))
    if change == "weights":
        monkeypatch.setattr(critters, "_weights", lambda folder: "other")
    if change == "limit":
        monkeypatch.setattr(critters, "IDENTITY_LIMIT", IDENTITY_LIMIT + 0.01)
    changed = Painter(painter.log, levels, seed=seed)
    (result,) = Bench(seed, 1, [changed], tmp_path).results()
    assert changed.calls() == [0]
    assert result.rows["bright"][0].background == pytest.approx(levels)
    list(Bench(seed, 1, [changed], tmp_path).results())
    assert changed.calls() == []


@pytest.mark.usefixtures("cheap")
def test_a_case_that_fails_is_recorded_and_tried_again(painter: Painter, tmp_path: Path) -> None:
    """The others are done; its traceback is stored and counted; the next run does it alone, and once it is done it stays so."""
    failing = Painter(painter.log, fails=[1])
    bench = Bench(5, 3, [failing, Copier()], tmp_path)
    for calls in ([0, 1, 2], [1]):
        results = by_case(list(bench.results()))
        assert sorted(failing.calls()) == calls
        assert len(results) == 6
        (broken,) = (one for one in results if one.error)
        assert (broken.case, broken.method, broken.rows) == (1, "painter", {})
        assert "Traceback" in str(broken.error)
        assert "ValueError: odd weather in case 1" in str(broken.error)
        stored = json.loads((bench.folder(1) / "painter.json").read_text(encoding="utf-8"))
        assert stored["error"] == broken.error
        summary = summarise(bench, results)
        assert (summary["failed"], summary["errors"]) == (1, [{"case": 1, "method": "painter", "error": broken.error}])
        assert [summary["methods"][row]["failed"] for row in ("plain", "bright", "copied")] == [1, 1, 0]
    mended = Bench(5, 3, [painter], tmp_path)
    assert [one.error for one in mended.results()] == [None] * 3
    assert painter.calls() == [1]
    list(mended.results())
    assert painter.calls() == []


@pytest.mark.usefixtures("cheap")
@each(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "null",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"psnr"', '"psn"'),
        lambda text: text.replace('"forward"', '"forwards"'),
        lambda text: text.replace('"error"', '"err"'),
        lambda text: text.replace("painter", "\udcff"),
    ],
)
def test_a_damaged_file_is_run_again(painter: Painter, tmp_path: Path, damage: Callable[[str], str]) -> None:
    """Whatever is wrong with it, that case alone is done again, and gives what it gave."""
    bench = Bench(5, 2, [painter], tmp_path)
    first = by_case(list(bench.results()))
    painter.calls()
    file = bench.folder(1) / "painter.json"
    whole = file.read_text(encoding="utf-8")
    file.write_bytes(damage(whole).encode("utf-8", "surrogateescape"))
    assert by_case(list(bench.results())) == first
    assert painter.calls() == [1]
    assert file.read_text(encoding="utf-8") == whole


@pytest.mark.slow
def test_two_workers_give_what_one_gives(painter: Painter, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same scores, costs and images, and the same failure; each case runs once, and no library prints anything."""
    found, calls = [], []
    for workers in (1, 2):
        failing = Painter(painter.log, fails=[2])
        bench = Bench(5, 3, [failing, Copier()], tmp_path / str(workers))
        found.append(by_case(list(bench.results(workers))))
        calls.append(sorted(failing.calls()))
    assert capfd.readouterr().err == ""
    one, two = found
    assert calls == [[0, 1, 2]] * 2
    assert [(a.case, a.method, a.rows) for a in one] == [(b.case, b.method, b.rows) for b in two]
    assert ["odd weather" in str(a.error) for a in one] == ["odd weather" in str(b.error) for b in two]
    pictures = [sorted((tmp_path / workers).rglob("*.png")) for workers in ("1", "2")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


# the summary


class Named(Method):
    """A method with a name and rows, which is never run."""

    def __init__(self, name: str, *rows: str) -> None:
        self.name, self.rows, self.settings = name, rows or (name,), {}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        raise AssertionError

    def passes(self, base: Any) -> dict[str, Passes]:
        raise AssertionError


def table(rows: dict[str, Sequence[tuple[Score, Cost] | None]], seed: int = 3) -> dict[str, Any]:
    """The summary of scores and costs by row and case; None is a failure."""
    cases = len(next(iter(rows.values())))
    results = [
        Result(case, row, {row: one} if one else {}, None if one else "Traceback: it broke")
        for row, all_cases in rows.items()
        for case, one in enumerate(all_cases)
    ]
    random.Random(0).shuffle(results)
    return summarise(Bench(seed, cases, [Named(row) for row in rows], Path("nowhere")), results)


YES, NO = worth(), worth(False, ["colour"], identity=None, psnr=10.0, ssim=0.25, clip=0.4, background=9.0)
HALF = worth(True, ["identity"], identity=0.8, psnr=15.0)


def test_means_are_those_of_the_cases() -> None:
    """Four cases by hand: shares over all, distances over all, an identity only where there is one, and every cost."""
    costs = [Cost(10, 4, 1.0, 100), Cost(20, 0, 9.0, 300), Cost(0, 2, 2.0, 100), Cost(10, 2, 4.0, 300)]
    summary = table({"one": list(zip([YES, NO, HALF, YES], costs, strict=True))})
    assert {"seed": 3, "cases": 4, "failed": 0, "errors": []}.items() <= summary.items()
    found = summary["methods"]["one"]
    means = {name: value["mean"] for name, value in found.items() if name not in ("failed", "kinds", "curve", "cost")}
    expected = {"success": 0.5, "attributes": 0.75, "aligned": 0.75, "kept": 0.5, "identity": 0.4, "background": 6.0}
    assert means == pytest.approx(expected | {"psnr": 16.25, "ssim": 0.4375, "clip": 0.175})
    assert found["cost"] == {"forward": 10, "backward": 2, "evaluations": 12, "seconds": 3, "adapter_bytes": 200}
    assert found["failed"] == 0


def test_every_measure_has_a_mean_and_its_interval() -> None:
    """Under the documented names, and the interval is around the mean."""
    summary = table({"one": [(score, Cost()) for score in (YES, NO, HALF, YES, NO)]})
    for name in ("success", "attributes", "aligned", "kept", "identity", "background", "psnr", "ssim", "clip"):
        found = summary["methods"]["one"][name]
        assert set(found) == {"mean", "low", "high"}
        assert found["low"] < found["mean"] < found["high"]


def test_an_interval_is_that_of_the_mean() -> None:
    """Of 400 values it is 1.96 standard errors to either side, within a tenth; of each four times it is half as wide."""
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    few, many = bootstrapped(values), bootstrapped(4 * values)
    assert few is not None
    assert many is not None
    error = np.std(values) / 20
    assert few.mean == pytest.approx(np.mean(values))
    assert [few.mean - few.low, few.high - few.mean] == pytest.approx([1.96 * error] * 2, rel=0.1)
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(0.5, rel=0.1)


def test_an_interval_is_the_same_every_time() -> None:
    """It does not depend on the global generators, and leaves them alone."""
    np.random.seed(0)
    first, state = bootstrapped([0, 1, 1, 0, 1]), np.random.get_state()[1]
    assert np.array_equal(state, np.random.get_state()[1])
    np.random.seed(1)
    assert bootstrapped([0, 1, 1, 0, 1]) == first


def test_no_values_have_no_mean_and_equal_values_no_width() -> None:
    """An interval of one value is that value."""
    assert bootstrapped([]) is None
    for values in ([2.5], [2.5] * 7):
        found = bootstrapped(values)
        assert found is not None
        assert (found.mean, found.low, found.high) == (2.5, 2.5, 2.5)


def test_a_failure_is_no_success() -> None:
    """It counts as a no in every share, is left out of distances and costs, and is counted itself."""
    summary = table({"one": [(YES, Cost(6, 2)), None, (YES, Cost(2, 2)), None], "none": [None] * 4})
    found, none = summary["methods"]["one"], summary["methods"]["none"]
    assert [found[name]["mean"] for name in ("success", "attributes", "aligned", "kept")] == [0.5] * 4
    assert [found[name]["mean"] for name in ("identity", "psnr")] == pytest.approx([0.2, 20])
    assert (found["cost"]["evaluations"], found["failed"], none["failed"], summary["failed"]) == (6, 2, 4, 6)
    assert (none["success"]["mean"], none["psnr"], none["cost"]) == (0, None, {})
    assert all(set(error) == {"case", "method", "error"} for error in summary["errors"])


def test_the_curve_is_the_success_at_each_limit() -> None:
    """It never falls, has the interval of a share, and is the strict figure at the limit of the benchmark; a failure stays one."""
    scores = [worth(identity=0.22), worth(True, ["identity"], identity=0.55), worth(True, ["facing"], identity=None)]
    scores += [worth(True, ["place"], identity=0.1), worth(False, identity=0.1)]
    found = table({"one": [*((score, Cost()) for score in scores), None]})["methods"]["one"]
    curve = {point["limit"]: point for point in found["curve"]}
    assert [curve[limit]["mean"] for limit in (0.2, 0.25, 0.5, 0.6, 1.5)] == pytest.approx([0, 1 / 6, 1 / 6, 2 / 6, 2 / 6])
    assert curve[IDENTITY_LIMIT]["mean"] == found["success"]["mean"] == pytest.approx(1 / 6)
    assert curve[0.6]["low"] < curve[0.6]["mean"] < curve[0.6]["high"]


def test_kinds_partition_the_cases() -> None:
    """The mean over all is that over the kinds by their numbers of cases, and each is that of its own cases."""
    scores = [random.Random(7 * case).choice([YES, NO, HALF]) for case in range(24)]
    found = table({"one": [(score, Cost()) for score in scores]})["methods"]["one"]
    sizes = Counter(case.kind for case in MANY[:24])
    assert set(found["kinds"]) == set(sizes) == set(KINDS)
    for measure in ("success", "aligned", "psnr"):
        together = sum(sizes[kind] * found["kinds"][kind][measure]["mean"] for kind in KINDS) / 24
        assert together == pytest.approx(found[measure]["mean"])
    for kind in KINDS:
        own = [score.success for score, case in zip(scores, MANY, strict=False) if case.kind == kind]
        assert found["kinds"][kind]["success"]["mean"] == pytest.approx(sum(own) / len(own))


def test_a_kind_without_a_case_is_not_reported() -> None:
    """Two cases are a pose and a colour."""
    assert list(table({"one": [(YES, Cost())] * 2})["methods"]["one"]["kinds"]) == ["pose", "colour"]


def test_ours_is_compared_case_by_case() -> None:
    """How far ours is ahead, and the mean and median of the pairs' ratios; a failure of either counts as no success and has no cost."""
    ours = [(YES, Cost(5, 5, 1.0)), (YES, Cost(10, 0, 2.0)), (NO, Cost(10, 10, 1.0)), (YES, Cost(4, 6, 1.0)), (YES, Cost(1, 1, 1.0))]
    other = [(NO, Cost(20, 0, 3.0)), (YES, Cost(20, 20, 2.0)), (NO, Cost(20, 0, 8.0)), (HALF, Cost(0, 50, 2.0)), None]
    summary = table({"other": other, "imagic-lora": ours})["methods"]
    assert "against" not in summary["imagic-lora"]
    against = summary["other"]["against"]
    assert against["success"]["mean"] == pytest.approx(0.6)
    assert against["psnr"]["mean"] == pytest.approx((10 + 0 + 0 + 5) / 4)
    assert against["evaluations"] == pytest.approx((2 + 4 + 1 + 5) / 4)
    assert against["seconds"] == pytest.approx(2.5)


def test_the_comparison_is_paired() -> None:
    """A row that succeeds just where ours does is behind by nothing, with no width, though the success of either is uncertain."""
    scores = [(YES, Cost(1)) if case % 3 else (NO, Cost(1)) for case in range(12)]
    summary = table({"imagic-lora": scores, "other": scores, "better": [(YES, Cost(1))] * 12})["methods"]
    assert summary["other"]["against"]["success"] == {"mean": 0, "low": 0, "high": 0}
    assert summary["better"]["against"]["success"]["mean"] == pytest.approx(-1 / 3)
    assert summary["better"]["against"]["success"]["low"] < -1 / 3


def test_nothing_is_compared_without_ours_and_no_ratio_is_infinite() -> None:
    """Without its row there is no comparison; where ours cost nothing there is no ratio."""
    assert "against" not in table({"other": [(YES, Cost(1, 1, 1.0))] * 2})["methods"]["other"]
    summary = table({"imagic-lora": [(YES, Cost())] * 2, "other": [(YES, Cost(1, 1, 1.0))] * 2})
    assert summary["methods"]["other"]["against"]["evaluations"] is None


def test_a_method_of_several_rows_is_compared_row_by_row() -> None:
    """Every row of every method is in the table, in their order."""
    methods = [Named("imagic-lora", "imagic-lora", "best"), Named("copier")]
    results = [Result(0, "copier", {"copier": (NO, Cost())})]
    results += [Result(0, "imagic-lora", {"imagic-lora": (NO, Cost(2)), "best": (YES, Cost(6))})]
    summary = summarise(Bench(3, 1, methods, Path("nowhere")), results)
    assert list(summary["methods"]) == ["imagic-lora", "best", "copier"]
    assert summary["methods"]["best"]["against"]["success"]["mean"] == -1
    assert summary["methods"]["best"]["against"]["evaluations"] == 3


def test_a_summary_is_json() -> None:
    """Strict JSON gives it back as it was."""
    summary = table({"imagic-lora": [(YES, Cost(1)), None, (NO, Cost(2))], "other": [None, None, (HALF, Cost(1))]})
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


# tables and the page


def test_tables_show_the_summary() -> None:
    """Shares in percent with their interval, costs, and a dash where there is nothing."""
    made = table({"imagic-lora": [(YES, Cost(1500, 500, 2.0, 870_000))] * 4, "broken": [None] * 4})
    main, kinds, curves, distances, costs, against = tables(made).values()
    for cells in (main, kinds, curves, distances, costs, against):
        assert {len(row) for row in cells.rows} == {len(cells.columns)}
    assert [list(row) for row in main.rows] == [["imagic-lora", *["100"] * 4], ["broken", *["0"] * 4]]
    assert list(distances.rows[0]) == ["imagic-lora", "0.20", "5.0", "20.0", "0.500", "0.100"]
    assert list(distances.rows[1]) == ["broken", "-", "-", "-", "-", "-"]
    assert list(costs.rows[0]) == ["imagic-lora", "1,500", "500", "2,000", "2.0", "0.87"]
    assert list(costs.rows[1]) == ["broken", "-", "-", "-", "-", "-"]
    assert dict(zip(kinds.columns, kinds.rows[0], strict=True))["animal"] == "-"
    assert [list(row) for row in against.rows] == [["broken", "+100", "+100", "-", "-", "-"]]
    assert [list(row) for row in curves.rows] == [["imagic-lora", *["100"] * 10], ["broken", *["0"] * 10]]


def test_a_share_has_its_interval() -> None:
    """Where it has one."""
    made = table({"imagic-lora": [(YES, Cost())] * 3 + [None]})
    low, high = (round(100 * made["methods"]["imagic-lora"]["success"][end]) for end in ("low", "high"))
    assert next(iter(tables(made).values())).rows[0][1] == f"75 [{low}-{high}]"


class Reader(HTMLParser):
    """Collects tags, pictures with the class of their cell, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.pictures: list[tuple[str | None, str, str]] = []
        self.text = ""
        self._cell: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(found)
        if tag == "td":
            self._cell = found.get("class")
        if tag == "img":
            self.pictures.append((self._cell, str(found["alt"]), str(found["src"])))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, str]:
    """A page all texts of which are hostile, and the run of it: two cases, two rows, one failure."""
    row, kind = "<script>row", "<script>kind"
    plain = case_at(3, 0)
    hostile: Any = lambda seed, index: replace(plain, index=index, kind=kind, prompt="<script>text</script>")  # noqa: E731
    bench = Bench(3, 2, [Named(row), Named("plain")], tmp_path)
    for index in range(2):
        bench.folder(index).mkdir(parents=True)
        for k, name in enumerate(("source", "truth", row, "plain")):
            Image.new("RGB", (4, 4), (index, k, 0)).save(bench.folder(index) / f"{name}.png")
    results = [
        Result(0, row, {row: (worth(True, ["<script>changed"]), Cost(1))}),
        Result(1, row, {}, "<script>error</script>"),
        Result(0, "plain", {"plain": (YES, Cost(1))}),
        Result(1, "plain", {"plain": (NO, Cost(1))}),
    ]
    summary = summarise(bench, results)
    monkeypatch.setattr(page, "case_at", hostile)
    path = write_page(bench, results, summary)
    assert path == tmp_path / "index.html"
    return bench, path.read_text(encoding="utf-8")


def test_all_text_of_the_page_is_escaped(written: tuple[Bench, str]) -> None:
    """Prompt, kind, row, changed attributes and error appear as text, and none of them is a tag."""
    html = written[1]
    reader = Reader()
    reader.feed(html)
    assert "<script" not in html.lower()
    for text in ("<script>text</script>", "<script>kind", "<script>row", "<script>changed", "<script>error</script>"):
        assert text in reader.text


def test_the_page_loads_and_runs_nothing(written: tuple[Bench, str]) -> None:
    """No script, no frame, no address; every picture is in it."""
    html = written[1]
    reader = Reader()
    reader.feed(html)
    assert not reader.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not {name for name in reader.attributes if name.startswith("on") or name in ("href", "srcset")}
    assert not re.search(r"https?:|url\(|@import", html)


def test_the_page_plots_the_curve_of_every_row(written: tuple[Bench, str]) -> None:
    """One line a row from the left edge to the right, at the height of its success."""
    lines = re.findall(r'<polyline points="([^"]+)"', written[1])
    ends = [[tuple(float(part) for part in point.split(",")) for point in line.split()] for line in lines]
    width, height = page.PLOT
    assert [(line[0][0], line[-1][0]) for line in ends] == [(0, width)] * 2
    assert [[y for _, y in line] for line in ends] == [[height] * 10, [height / 2] * 10]


def test_every_picture_is_on_the_page_with_its_frame(written: tuple[Bench, str]) -> None:
    """The photo, the true edit and one for each row that did not fail, bit for bit, with a frame in the colour of its score."""
    bench, html = written
    reader = Reader()
    reader.feed(html)
    row = "<script>row"
    expected = [(0, None, "source"), (0, None, "truth"), (0, "aligned", row), (0, "success", "plain")]
    expected += [(1, None, "source"), (1, None, "truth"), (1, "missed", "plain")]
    alts = {"source": "photo", "truth": "true edit"}
    assert [(state, alt) for state, alt, _ in reader.pictures] == [(state, alts.get(name, name)) for _, state, name in expected]
    for (index, _, name), (_, _, source) in zip(expected, reader.pictures, strict=True):
        start, data = source.split(",", 1)
        assert start == "data:image/png;base64"
        assert base64.b64decode(data) == (bench.folder(index) / f"{name}.png").read_bytes()
    assert reader.text.count("failed") == 2  # one in the heading, one in place of a picture


# the catalogue


SHIPPED = [name for name in names_for("critters") if name != "reference-retuned"]


def test_the_catalogue_has_these_methods() -> None:
    """Each under its own name, no two with a row in common, their settings JSON."""
    assert list(CATALOGUE) == [
        "bounds",
        "prompt-only",
        "sdedit",
        "imagic-lora",
        "imagic-full",
        "embedding-only",
        "reference",
        "reference-retuned",
        "ddim-inversion",
        "ddib",
        "negative-prompt",
        "proximal",
        "null-text",
        "edit-friendly",
        "renoise",
        "magicmix",
        "magicmix-text",
        "prompt-to-prompt",
        "prompt-to-prompt-text",
        "direct-inversion",
        "diffedit",
        "diffedit-mask",
        "blended-latent",
        "ledits++",
        "flowedit",
        "rf-inversion",
        "dreambooth",
        "textual-inversion",
    ]
    methods = chosen(",".join(SHIPPED))
    assert [method.name for method in methods] == SHIPPED
    rows = [row for method in methods for row in method.rows]
    assert len(rows) == len(set(rows))
    assert {"copy", "oracle", "prompt-only", "sdedit-0.5", "sdedit-0.9", "imagic-lora", "imagic-lora-noise", "embedding-only-image"} < set(
        rows
    )
    json.dumps([method.settings for method in methods], allow_nan=False)


@each("index", range(10))
def test_a_given_mask_covers_what_the_true_edit_changes(index: int) -> None:
    """Every changed pixel and those up to two pixels beside it, and no other."""
    case = case_at(3, index)
    mask = np.asarray(given_mask(case))
    changed = (np.asarray(render(case.source)) != np.asarray(render(case.truth))).any(2)
    near = np.pad(changed, 2)
    grown = np.any([near[dy : dy + 64, dx : dx + 64] for dy in range(5) for dx in range(5)], axis=0)
    assert np.array_equal(mask == 255, grown)
    assert set(np.unique(mask)) <= {0, 255}
    assert changed.any()


@pytest.mark.usefixtures("cheap")
def test_only_methods_that_need_a_mask_get_one() -> None:
    """And their rows say that it is given."""
    rows = {method.name: method.rows for method in chosen("diffedit,diffedit-mask,blended-latent")}
    assert rows == {
        "diffedit": ("diffedit",),
        "diffedit-mask": ("diffedit-mask-given",),
        "blended-latent": ("blended-latent-given",),
    }
    seen = {}

    class Recorder(Painter):
        def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
            seen[self.requires] = request.mask
            return iter(())

    class Masked(Recorder):
        requires = frozenset({"mask"})

    for method in (Recorder(Path()), Masked(Path())):
        list(Bench(3, 2, [method], Path()).edits(method, case_at(3, 1)))
    assert seen[frozenset()] is None
    assert seen[frozenset({"mask"})] == given_mask(case_at(3, 1))


def test_methods_come_in_the_order_of_the_list() -> None:
    """Each once; spaces do not matter."""
    assert [method.name for method in chosen("sdedit, bounds ,sdedit")] == ["sdedit", "bounds"]


@each("names", ["nonsense", "bounds,nonsense", "", "bounds,", "Bounds"])
def test_an_unknown_method_is_refused(names: str) -> None:
    """The error says which there are."""
    with pytest.raises(ImagicError, match="Expected") as caught:
        chosen(names)
    assert all(name in caught.value.expected for name in names_for("critters"))
    assert names.split(",")[-1] in caught.value.got


@each("mode", ["lora", "full"])
def test_ours_takes_a_seventh_of_the_reference(mode: Mode) -> None:
    """Of its passes through the denoiser, the edit included."""
    (theirs,) = chosen("reference")
    assert isinstance(theirs, Imagic)
    assert passes(defaults(mode)) <= passes(theirs.config) / 7


def test_another_budget_goes_as_long_a_way() -> None:
    """Twice the steps at half the rates, in both stages, and nothing else."""
    usual, twice = defaults("full"), budgeted("full", 2)
    assert twice.embed == usual.embed.model_copy(update={"steps": 2 * usual.embed.steps, "learning_rate": usual.embed.learning_rate / 2})
    assert twice.tune == usual.tune.model_copy(update={"steps": 2 * usual.tune.steps, "learning_rate": usual.tune.learning_rate / 2})
    assert twice.model_copy(update={"embed": usual.embed, "tune": usual.tune}) == usual


def passes(config: RunConfig) -> int:
    """Through the denoiser, of one sample: forward and backward in training, twice a guided step, once a step of an inversion."""
    training = 2 * sum(stage.steps * stage.batch_size for stage in (config.embed, config.tune))
    return training + config.edit.steps * (3 if config.edit.start == "inverted" else 2)


def test_ours_run_with_the_recipe_of_the_embedded_base() -> None:
    """In the mode that the name says, and nothing else is set."""
    for mode in ("lora", "full"):
        (method,) = chosen(f"imagic-{mode}")
        assert isinstance(method, Imagic)
        assert (method.config.base, method.config.tune.mode, method.config.resolution) == ("critters", mode, None)
        found = method.config.model_dump(exclude_unset=True)
        found["tune"].pop("mode")
        assert found == {**RECIPES["critters"][mode], "base": "critters"}


def test_a_flow_has_its_own_methods_and_its_recipe() -> None:
    """FlowEdit and RF-Inversion, and none for U-Nets; every other start in a row of its own; the recipe of the base by name."""
    methods = chosen(None, "critters-dit")
    assert [method.name for method in methods] == names_for("critters-dit")
    assert set(CATALOGUE) - set(names_for("critters")) == {"flowedit", "rf-inversion"} < set(names_for("critters-dit"))
    assert "null-text" not in names_for("critters-dit")
    usual = defaults("lora", base="critters-dit")
    assert (usual.base, usual.tune.targets) == ("critters-dit", RECIPES["critters-dit"]["lora"]["tune"]["targets"])
    (ours,) = (method for method in methods if method.name == "imagic-lora")
    others = {f"imagic-lora-{start}" for start in ("noise", "image", "inverted", "flow") if start != usual.edit.start}
    assert set(ours.rows) == {"imagic-lora", *others}
    for name, base in (("null-text", "critters-dit"), ("flowedit", "critters")):
        with pytest.raises(ImagicError, match=f"{name} does not work on a") as caught:
            chosen(name, base)
        assert name not in caught.value.expected.split(", ")


@pytest.mark.slow
def test_every_method_of_a_flow_runs(tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, on a small base of that name: no row fails, and the fits are those of its recipe."""
    short = {"embed": {"steps": 2}, "tune": {"steps": 2}, "edit": {"steps": 2}, "monitoring": {"convergence_every": 0}}
    recipe = {part: merged(settings, {k: v for k, v in short.items() if k != "tune" or k in settings}) for part, settings in DIT.items()}
    monkeypatch.setitem(RECIPES, "critters-dit", recipe)
    monkeypatch.chdir(tmp_path)
    critters._context.cache_clear()
    names = ",".join(name for name in names_for("critters-dit") if not name.startswith("reference"))
    assert cli.main(["bench", "critters", "--base", "critters-dit", "--methods", names, "--cases", "1", "--seed", "3"]) == 0
    critters._context.cache_clear()  # whose base belongs to this test
    summary = json.loads((tmp_path / "outputs/bench/critters-dit-3/summary.json").read_text(encoding="utf-8"))
    assert (summary["base"], summary["failed"], summary["errors"]) == ("critters-dit", 0, [])
    rows = summary["methods"]
    assert {"imagic-lora", "imagic-lora-flow", "imagic-full", "embedding-only-flow", "flowedit", "flowedit-3", "sdedit-0.65"} < set(rows)
    assert rows["imagic-lora"]["cost"]["backward"] == rows["imagic-full"]["cost"]["backward"] == 4
    assert rows["embedding-only"]["cost"]["backward"] == 2


@each(
    "base, word",
    [("sd15", "--base sd15, for images of 512 pixels"), ("nobody", "no base called 'nobody'"), ("/nowhere", "no file or folder /nowhere")],
)
def test_a_base_of_other_pictures_is_refused(base: str, word: str) -> None:
    """By its size, before anything is loaded."""
    with pytest.raises(ImagicError) as caught:
        kind_of(base)
    assert word in caught.value.got


def test_a_reference_is_its_file_on_the_embedded_base() -> None:
    """All that ``reference-imagic.yaml`` says holds, but for the base, and its size is the base's own."""
    (method,) = chosen("reference")
    assert isinstance(method, Imagic)
    assert (method.config.base, method.config.resolution) == ("critters", None)
    file = yaml.safe_load((catalogue.RECIPE_FILES / "reference-imagic.yaml").read_text(encoding="utf-8"))
    found = method.config.model_dump()
    for name, value in file.items():
        if isinstance(value, dict):
            assert {**found[name], **value} == found[name]
        elif name not in ("base", "resolution"):
            assert found[name] == value


def test_the_retuned_reference_is_what_its_file_gives_the_command() -> None:
    """``fit --config`` lays the file over the base's recipe, the benchmark over nothing: only what noise has no use for may differ."""
    (method,) = chosen("reference-retuned")
    assert isinstance(method, Imagic)
    file = read_yaml(catalogue.RECIPE_FILES / "reference-imagic-retuned.yaml")
    fitted = resolve({"resolution": None}, file, RECIPES["critters"]).model_dump()
    measured = method.config.model_dump()
    assert measured["edit"]["start"] == "noise"
    for name in ("source_eta", "padding_eta"):
        assert fitted["edit"].pop(name) != measured["edit"].pop(name)
    assert fitted.pop("monitoring") != measured.pop("monitoring")  # what only informs is left out of a benchmark
    assert fitted == measured


# the command


@each(
    "flags, word",
    [
        (["--cases", "0"], "--cases 0"),
        (["--cases", "-3"], "--cases -3"),
        (["--seed=-1"], "--seed -1"),
        (["--workers", "0"], "--workers 0"),
        (["--methods", "nonsense"], "nonsense"),
        (["--methods", "bounds,"], "--methods"),
    ],
)
def test_a_bad_flag_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    """Exit code 2, the flag in the message, an empty folder, and JSON where it was asked for."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "critters", *flags, "--json"]) == 2
    out, err = capsys.readouterr()
    assert word in json.loads(out)["error"]["got"]
    assert "Error" in err
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    """So that none is there that nobody can find."""
    assert cli.main(["bench", "critters", "--help"]) == 0
    words = re.split(r"[\s,;.│]+", capsys.readouterr().out)
    assert set(CATALOGUE) <= set(words)


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the base that ships, two cases of the bounds: one JSON object on stdout, the same in a file, and a page; the table from what is
    there."""
    monkeypatch.chdir(tmp_path)
    flags = ["bench", "critters", "--methods", "bounds", "--cases", "2", "--seed", "3"]
    assert cli.main([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    folder = Path("outputs/bench/critters-3")
    assert answer["methods"]["oracle"]["success"]["mean"] == 1
    assert answer["methods"]["copy"]["success"]["mean"] == answer["methods"]["copy"]["aligned"]["mean"] == 0
    assert answer["methods"]["copy"]["kept"]["mean"] == 1
    assert answer["methods"]["copy"]["cost"]["evaluations"] == answer["methods"]["oracle"]["cost"]["evaluations"] == 0
    assert (answer.pop("page"), answer["seed"], answer["cases"]) == (str(folder / "index.html"), 3, 2)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == answer
    assert {path.name for path in folder.iterdir()} == {"cases", "index.html", "summary.json"}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("cases/*/*")}
    assert cli.main(flags) == 0
    out = capsys.readouterr().out
    assert "oracle" in out
    assert ["oracle", "100", "100", "100", "100"] in [line.split() for line in out.splitlines()]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cases/*/*")} == times


def test_the_command_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cheap: None
) -> None:
    """The run ends well, and says how many there were and where to look."""
    monkeypatch.setitem(CATALOGUE, "bounds", lambda _: Painter(tmp_path / "calls", fails=[0]))
    assert cli.main(["bench", "critters", "--methods", "bounds", "--cases", "2", "--out", str(tmp_path / "here")]) == 0
    assert "1 failed" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "here" / "summary.json").read_text(encoding="utf-8"))["failed"] == 1


def test_kinds_are_attributes() -> None:
    """Each is one of the five, the pose first."""
    kinds: Sequence[Kind] = KINDS
    assert set(kinds) == set(ATTRIBUTES)
    assert kinds[0] == "pose"


@pytest.mark.slow
def test_edits_really_happen(tmp_path: Path) -> None:
    """Twelve cases of a seed that neither chose nor claims anything: the bounds bound, and imagic-lora changes what was asked for."""
    bench = Bench(3, 12, chosen("bounds,imagic-lora"), tmp_path)
    rows = summarise(bench, list(bench.results()))["methods"]
    share = {(row, name): rows[row][name]["mean"] for row in rows for name in ("success", "attributes", "aligned")}
    assert share["copy", "success"] == 0
    assert share["oracle", "success"] >= 0.9
    assert share["imagic-lora", "aligned"] >= 0.4
    assert share["imagic-lora", "attributes"] >= 0.2
    assert rows["imagic-lora"]["background"]["mean"] <= 25
    assert rows["imagic-lora"]["cost"]["adapter_bytes"] <= 1e6


def test_a_narrow_terminal_loses_no_figure() -> None:
    """At 80 columns the longest intervals go on in a second line, the names of methods stay whole."""
    wide = ["+100 [+100 to +100]"] * 4
    cells = Table(("method", "success, ahead by", "attributes, ahead by", "evals, times", "s, times"), [["embedding-only-inverted", *wide]])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(cells_table("Each against each", cells))
    shown = console.export_text()
    assert "…" not in shown
    assert "embedding-only-inverted" in shown
    assert shown.count("+100") == 12
