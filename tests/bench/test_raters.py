"""The user study without a browser: what the page holds, what each rater sees, which answers are accepted, and the rates."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Run, each
from PIL import Image
from raters import answers_file, bench_folder, chosen_side

from imagic_lora.bench.study.key import Answers, Key, read_answers
from imagic_lora.bench.study.page import Study, data_url, make_study
from imagic_lora.bench.study.planning import files_of, plan_sheets, questions_of
from imagic_lora.bench.study.rates import Vote, clustered, rate_of, report, wilson
from imagic_lora.bench.study.results import Item, read_results
from imagic_lora.cli.app import main
from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.png import write_png

METHODS = ["ours-of-secret-name", "other-of-secret-name"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_folder(tmp_path_factory.mktemp("bench") / "run", [*METHODS, "third"], cases=6)


@pytest.fixture(scope="module")
def study(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two methods with four raters, who answer all six questions and one of them again."""
    folder = tmp_path_factory.mktemp("study")
    assert main(["study", "make", str(results), "--methods", ",".join(METHODS), "--raters", "4", "--out", str(folder)]) == 0
    return folder


def key_of(folder: Path) -> Key:
    return Key.model_validate_json((folder / "key.json").read_text())


def embedded(page: str) -> dict[str, Any]:
    """The data that the script of a page reads."""
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def made(items: Sequence[Item]) -> Study:
    """A study of methods a and b with one rater, on two items."""
    images = {path: data_url(path) for path in files_of(items, ["a", "b"])}
    questions, _ = questions_of(items, ["a", "b"], images)
    return make_study(questions, plan_sheets(2, 1, 3, 0), ["a", "b"], 0, images)


# the page


def test_the_page_is_whole_and_names_no_method(study: Path) -> None:
    """It has no address outside of itself, and nothing of the methods: no name, no metadata, no order."""
    page = (study / "study.html").read_text()
    assert "secret" not in page
    markup = re.sub("data:image/png;base64,[A-Za-z0-9+/=]+", "", page.split("<script>")[0])
    assert not re.search(r"(src|href)=|url\(|@import|https?:|//", markup)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import|sendBeacon)\b", page.split("<script>")[1])
    assert "default-src 'none'" in page
    key, data = key_of(study), embedded(page)
    for picture in data["pictures"].values():
        assert picture.startswith("data:image/png;base64,")
        assert b"tEXt" not in base64.b64decode(picture.split(",")[1])
    edits = [list(question.edits.values()) for question in key.questions.values()]
    assert {ours < other for ours, other in edits} == {True, False}
    assert {len(name) for name in data["pictures"]} == {3}
    assert data["study"] == key.study
    assert len(data["pictures"]) == 18


def test_what_a_prompt_says_is_no_html(tmp_path: Path) -> None:
    """Neither a tag, nor the end of the script, nor a template."""
    for name in ("source", "a", "b"):
        write_png(Image.new("RGB", (4, 4), {"source": "white", "a": "red", "b": "blue"}[name]), tmp_path / f"{name}.png", None)
    prompt = "</script><img src=x onerror=alert(1)> & \"quotes\" {{ 7 * 7 }} 'x' \u2028"
    item = Item("run/1", prompt, tmp_path / "source.png", {name: tmp_path / f"{name}.png" for name in "ab"})
    page = made([item, Item("run/2", "a cat", item.photo, item.edits)]).page
    assert "<img src=x" not in page
    assert page.count("</script>") == 2
    assert "49" not in [one["prompt"] for one in embedded(page)["questions"].values()]
    assert prompt in [one["prompt"] for one in embedded(page)["questions"].values()]


def test_large_images_are_scaled_to_the_page(tmp_path: Path) -> None:
    """Longer than 768 pixels they become JPEG of that size; small ones are kept byte for byte."""
    folder = bench_folder(tmp_path / "run", ["a", "b"], cases=2, size=1000)
    for picture in embedded(made(read_results([folder])).page)["pictures"].values():
        image = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1])))
        assert (image.format, image.size) == ("JPEG", (768, 768))
        assert "exif" not in image.info


def test_the_same_command_makes_the_same_study(results: Path, study: Path, run: Run) -> None:
    """So that a lost page can be made again; another seed makes another study, whose answers do not mix."""
    command = ["study", "make", results, "--methods", ",".join(METHODS), "--raters", 4]
    code, out, _ = run(*command, "--json")
    first = json.loads(out)
    assert (code, first["study"], first["questions"], first["questions_per_rater"]) == (0, key_of(study).study, 6, 7)
    assert Path(first["page"]).read_bytes() == (study / "study.html").read_bytes()
    assert run(*command, "--out", study)[0] == 0
    code, _, err = run(*command, "--seed", 1, "--out", study)
    assert (code, "holds another study" in err) == (2, True)
    assert key_of(study).seed == 0
    code, out, _ = run(*command, "--seed", 1, "--json")
    assert json.loads(out)["study"] != first["study"]


# results


def test_a_study_reads_what_bench_and_compare_write(results: Path, tmp_path: Path) -> None:
    """Several folders at once; failed methods and equal images are left out and counted."""
    comparison = tmp_path / "compared"
    comparison.mkdir()
    methods = [{"name": "third", "file": "third.png"}, {"name": METHODS[0], "file": "ours.png"}, {"name": "left", "left_out": "no"}]
    (comparison / "results.json").write_text(json.dumps({"version": 1, "target_prompt": "a cat", "methods": methods}))
    for name in ("photo", "third", "ours"):
        write_png(Image.new("RGB", (8, 8), "red"), comparison / f"{name}.png", None)
    items = read_results([results, comparison])
    assert [item.name for item in items] == [f"run/5-{k:04d}" for k in range(6)] + ["compared"]
    assert set(items[0].edits) == {*METHODS, "third"}
    assert (items[-1].prompt, set(items[-1].edits)) == ("a cat", {"third", METHODS[0]})
    methods = [METHODS[0], METHODS[1], "third"]
    questions, left_out = questions_of(items, methods, {path: data_url(path) for path in files_of(items, methods)})
    assert len(questions) == 12
    assert left_out == [
        f"1 photo without edits by both {METHODS[0]} and {METHODS[1]}",
        f"1 photo where {METHODS[0]} and third made the same image",
    ]


BAD_RESULTS = {
    "absent": ("", "is not a folder"),
    "empty": ("rm -r cases", "holds no results"),
    "damaged": ("echo '{' > cases/5-0000/third.json", "is no file of results"),
    "no rows": ("echo '{}' > cases/5-0000/third.json", "is no file of results"),
    "an image is missing": ("rm cases/5-0000/third.png", "is missing"),
    "no photo": ("rm cases/5-0000/source.png", "is missing"),
    "all failed": ("""for f in cases/*/*.json; do echo '{"rows": {}}' > $f; done""", "holds no edits"),
}


@each("command, message", BAD_RESULTS)
def test_results_that_are_none_are_rejected(command: str, message: str, results: Path, tmp_path: Path) -> None:
    """By name, before anything is written."""
    folder = tmp_path / "run"
    if command:
        shutil.copytree(results, folder)
        subprocess.run(command, shell=True, check=True, cwd=folder)
    with pytest.raises(ImagicError, match=message):
        read_results([folder])


@each(
    "flags, message",
    [
        (["--methods", "ours-of-secret-name,nobody"], "nobody expected: one of other-of-secret-name"),
        (["--methods", "ours-of-secret-name"], "two or more different methods"),
        (["--methods", "third,third"], "two or more different methods"),
        (["--methods", ",".join(METHODS), "--raters", 0], "--raters 0"),
        (["--methods", ",".join(METHODS), "--questions", 2], "--questions 2"),
    ],
)
def test_a_study_that_cannot_be_is_rejected(flags: Sequence[object], message: str, results: Path, run: Run) -> None:
    code, out, err = run("study", "make", results, *(["--raters", 3] if "--raters" not in flags else []), *flags)
    assert (code, out, message in err) == (2, "", True), err
    assert not Path("outputs").exists()


# what raters see


@each("questions, raters, shown", [(100, 20, 20), (6, 5, 20), (19, 30, 20), (2, 3, 3), (48, 12, 10), (1, 40, 20)])
def test_questions_and_sides_are_balanced_and_one_comes_twice(questions: int, raters: int, shown: int) -> None:
    """In every sheet each question is there once, but one: again, later, on the other side."""
    sheets = plan_sheets(questions, raters, shown, seed=4)
    assert sheets == plan_sheets(questions, raters, shown, seed=4) != plan_sheets(questions, raters, shown, seed=5)
    asked: Counter[int] = Counter()
    for sheet in sheets:
        count = Counter(trial.question for trial in sheet)
        assert len(sheet) == min(shown, questions + 1)
        assert sorted(count.values()) == [1] * (len(count) - 1) + [2]
        (again,) = (question for question, times in count.items() if times == 2)
        first, second = (k for k, trial in enumerate(sheet) if trial.question == again)
        assert second - first >= len(sheet) // 3
        assert sheet[first].swapped != sheet[second].swapped
        once = sheet[:second] + sheet[second + 1 :]
        assert abs(2 * sum(trial.swapped for trial in once) - len(once)) <= 1
        asked += Counter(trial.question for trial in once)
    assert max(asked.values()) - min(asked[question] for question in range(questions)) <= 1 + (shown >= questions)
    right = sum(sheet[0].swapped for sheet in sheets)
    assert 0 < right < raters
    assert len({tuple(sheet) for sheet in sheets}) == (raters if questions > 2 else 2)


# answers


def careful(folder: Path, key: Key, rater: int, prefers: str = METHODS[0], careless: bool = False) -> Path:
    """Answers of a rater who always prefers one method, or fails at the repeated question."""
    sides = [chosen_side(key, shown, prefers) for shown in key.sheets[rater - 1]]
    if careless:
        asked = [shown.question for shown in key.sheets[rater - 1]]
        again = next(k for k, question in enumerate(asked) if question in asked[:k])
        sides[again] = "left" if sides[again] == "right" else "right"
    return answers_file(folder, key, rater, sides)


def test_the_report_gives_rates_intervals_and_a_chart(study: Path, tmp_path: Path, run: Run) -> None:
    """Two raters prefer ours, one the other; the careless one is left out, or counted where asked for."""
    key = key_of(study)
    files = [careful(tmp_path, key, 1), careful(tmp_path, key, 2), careful(tmp_path, key, 3, METHODS[1])]
    files.append(careful(tmp_path, key, 4, METHODS[1], careless=True))
    code, out, _ = run("study", "report", *files, "--study", study, "--json")
    found = json.loads(out)
    one = found["comparisons"][METHODS[1]]
    assert (code, found["method"], found["raters"]["read"], found["raters"]["careless"]) == (0, METHODS[0], [1, 2, 3, 4], [4])
    assert (one["answers"], one["preferred"], one["rate"]) == (18, 12, 12 / 18)
    assert one["wilson"] == list(wilson(12, 18))
    assert one["bootstrap"][0] == 0.0
    assert one["bootstrap"][1] == 1.0
    assert all(item == {"answers": 3, "preferred": 2} for item in one["items"].values())
    assert len(one["items"]) == 6
    assert json.loads((study / "report.json").read_text())["comparisons"] == found["comparisons"]
    with Image.open(study / "preferences.png") as chart:
        assert chart.size == (474, 420)
    code, out, _ = run("study", "report", *files, "--study", study, "--keep-careless", "--json")
    assert json.loads(out)["comparisons"][METHODS[1]]["answers"] == 24
    code, out, err = run("study", "report", *files, "--study", study)
    assert ("67" in out, "3 of 4 raters count" in out, "rater 4; left out" in err) == (True, True, True)


def test_without_a_careful_rater_there_is_no_report(study: Path, tmp_path: Path, run: Run) -> None:
    file = careful(tmp_path, key_of(study), 1, careless=True)
    code, _, err = run("study", "report", file, "--study", study)
    assert (code, "all of 1 raters are careless" in err) == (2, True)


def test_a_file_counts_once_and_a_number_is_one_rater(study: Path, tmp_path: Path) -> None:
    key = key_of(study)
    file = careful(tmp_path, key, 1)
    assert len(read_answers([file, file], key)) == 1
    (tmp_path / "b").mkdir()
    with pytest.raises(ImagicError, match="different answers of rater 1"):
        read_answers([file, careful(tmp_path / "b", key, 1, METHODS[1])], key)


CHANGES: dict[str, tuple[Any, str]] = {
    "another choice": (lambda one: one["answers"][0].update(chosen=other_side(one["answers"][0])), "was changed"),
    "an edit of another question": (lambda one: one["answers"][0].update(chosen=one["answers"][1]["left"]), "no such edit"),
    "an answer less": (lambda one: one["answers"].pop(), "does not answer the questions of rater 1"),
    "another order": (lambda one: one["answers"].reverse(), "does not answer the questions of rater 1"),
    "sides exchanged": (lambda one: one["answers"][0].update(left=one["answers"][0]["right"]), "does not answer"),
    "another rater": (lambda one: one.update(rater=2), "does not answer the questions of rater 2"),
    "no such rater": (lambda one: one.update(rater=5), "a rater from 1 to 4"),
    "another study": (lambda one: one.update(study="0123456789ab"), "belongs to study 0123456789ab"),
    "seconds below 0": (lambda one: one["answers"][0].update(seconds=-1), "answers.0.seconds = -1"),
    "an unknown name": (lambda one: one.update(name="x"), "name = 'x'"),
    "another version": (lambda one: one.update(version=2), "version = 2"),
    "a rater in words": (lambda one: one.update(rater="1"), "rater = '1'"),
}


def other_side(answer: dict[str, str]) -> str:
    return answer["left"] if answer["chosen"] == answer["right"] else answer["right"]


@each("change, message", CHANGES)
def test_changed_and_foreign_answers_are_rejected(change: Any, message: str, study: Path, tmp_path: Path) -> None:
    """Each by what is wrong with it."""
    file = careful(tmp_path, key_of(study), 1)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ImagicError, match=re.escape(message)):
        read_answers([file], key_of(study))


def test_what_is_no_file_of_answers_ends_with_exit_code_2(study: Path, tmp_path: Path, run: Run) -> None:
    """An absent file, an image, the key itself, a foreign study without a folder; nothing is written."""
    (tmp_path / "no.json").write_bytes(b"\x89PNG")
    good = careful(tmp_path, key_of(study), 1)
    for tokens, message in (
        (["absent.json", "--study", study], "absent.json cannot be read"),
        (["no.json", "--study", study], "a file of answers"),
        ([study / "key.json", "--study", study], "a file of answers"),
        ([good], "key.json cannot be read"),
        ([good, "--study", tmp_path], "key.json cannot be read"),
    ):
        code, out, err = run("study", "report", *tokens)
        assert (code, out, message in err) == (2, "", True), err
    foreign = json.loads(good.read_text()) | {"study": "../../x"}
    good.write_text(json.dumps(foreign))
    code, _, err = run("study", "report", good)
    assert (code, "study = '../../x'" in err) == (2, True)


# rates


def test_wilson_solves_its_equation() -> None:
    """Both ends satisfy |p - k/n| = z sqrt(p (1 - p) / n); 0 and 1 are ends where nobody or everybody prefers it."""
    for n in (1, 2, 19, 385, 3052):
        for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            for p in wilson(k, n):
                if p not in (0.0, 1.0):
                    assert abs(p - k / n) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), abs=1e-12)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 10)[1] == pytest.approx(0.277533, abs=1e-6)  # z^2 / (n + z^2)
    assert wilson(2136, 3052) == pytest.approx((0.6834, 0.7159), abs=1e-4)


def test_the_bootstrap_widens_with_alike_answers_and_only_then() -> None:
    """With raters and photos that do not matter it is near the normal interval; with raters of opposite minds it is far wider."""
    rng = np.random.default_rng(1)
    free = [Vote(rater, f"i{item}", bool(rng.random() < 0.7)) for rater in range(30) for item in range(40)]
    low, high = clustered(free) or (0.0, 0.0)
    rate = rate_of(free).rate
    assert low < rate < high
    deviation = math.sqrt(rate * (1 - rate) / len(free))  # resampling both adds the noise of an answer up to three times (Owen 2007)
    assert 2 * 1.96 * deviation * 0.9 < high - low < 2 * 1.96 * deviation * math.sqrt(3) * 1.15
    minded = [Vote(rater, f"i{item}", rater % 3 > 0) for rater in range(30) for item in range(40)]
    low, high = clustered(minded) or (0.0, 0.0)
    between = math.sqrt((2 / 9) / 30)  # of the mean of 30 raters, each 0 or 1
    assert high - low == pytest.approx(2 * 1.96 * between, rel=0.08)
    assert clustered([vote for vote in free if vote.rater == 0]) is None
    assert clustered([vote for vote in free if vote.item == "i0"]) is None


def test_the_repeated_question_counts_once_and_the_first_answer(study: Path, tmp_path: Path) -> None:
    key = key_of(study)
    file = careful(tmp_path, key, 1, careless=True)
    found = report(key, {1: Answers.model_validate_json(file.read_text())}, keep_careless=True)
    rate = found.rates[METHODS[1]]
    assert rate is not None
    assert (rate.answers, rate.preferred) == (6, 6)
