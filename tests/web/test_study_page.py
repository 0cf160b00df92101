"""The page of a user study in headless Chromium: 20 answers by mouse, touch and keys, the exported file, the look at every size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from acting import faults_of
from common import Run
from conftest import AXE, SHOTS, WINDOWS, need
from raters import bench_folder, chosen_side

from imagic_lora.bench.study.key import Key

pytestmark = pytest.mark.web
PAUSE = 300  # milliseconds: the page ignores a second click that comes sooner


@pytest.fixture
def made(tmp_path: Path, run: Run) -> Path:
    results = bench_folder(tmp_path / "run", ["ours", "other", "third"], cases=12)
    assert run("study", "make", results, "--methods", "ours,other,third", "--raters", 3, "--out", tmp_path / "study")[0] == 0
    return tmp_path / "study"


def opened(context: Any, folder: Path, rater: int) -> tuple[Any, list[str]]:
    """The page of a rater, and what went wrong on it: errors of scripts, requests of anything."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(f"{(folder / 'study.html').as_uri()}#{rater}")
    return page, wrong


def answer(page: Any, side: str, way: str) -> None:
    page.wait_for_timeout(PAUSE)
    if way == "key":
        page.keyboard.press(f"Arrow{side.title()}")
    elif way == "tap":
        page.locator(f"#{side}").tap()
    else:
        page.locator(f"#{side}").click()


def test_twenty_answers_are_given_exported_and_evaluated(browser: Any, made: Path, tmp_path: Path, run: Run) -> None:
    """Rater 2 prefers ours always and is careful: a reload, a double click and a step back lose nothing and add nothing."""
    key = Key.model_validate_json((made / "key.json").read_text())
    sheet = key.sheets[1]
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, accept_downloads=True)
    page, wrong = opened(context, made, 2)
    assert page.locator("#number").input_value() == "2"
    page.get_by_role("button", name="Start").click()
    for k, shown in enumerate(sheet):
        assert page.locator("#count").inner_text() == f"{k + 1} of 20"
        assert page.locator("#prompt").inner_text() == f"\u201c{key.questions[shown.question].prompt}\u201d"
        side = chosen_side(key, shown, "ours")
        if k == 3:
            page.wait_for_timeout(PAUSE)
            page.locator(f"#{side}").dblclick()
        else:
            answer(page, side, ("key", "tap", "click")[k % 3])
        if k == 5:
            page.reload()
            page.get_by_role("button", name="Start").click()
        if k == 8:
            page.keyboard.press("Backspace")
            assert page.locator("#count").inner_text() == "9 of 20"
            answer(page, side, "key")
    page.get_by_text("Thank you").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert page.locator("#text").input_value() == file.read_text()
    assert not wrong
    context.close()
    assert file.name == f"answers-{key.study}-2.json"
    assert [one["question"] for one in json.loads(file.read_text())["answers"]] == [shown.question for shown in sheet]
    assert all(one["seconds"] >= 0.2 for one in json.loads(file.read_text())["answers"])
    code, out, _ = run("study", "report", file, "--study", made, "--json")
    found = json.loads(out)
    assert (code, found["raters"]["read"], found["raters"]["careless"]) == (0, [2], [])
    assert [one["rate"] for one in found["comparisons"].values() if one] == [1.0, 1.0]
    assert sum(one["answers"] for one in found["comparisons"].values()) == 19


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_the_page_is_accessible_and_fits_the_window(browser: Any, made: Path, width: int, scheme: str) -> None:
    """Start, question and end: nothing wider than the window; photo and edits of a question are on the screen at once."""
    need(AXE, "axe-core (npm)")
    height = 844 if width == 390 else 800
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, wrong = opened(context, made, 1)
    faults = []

    def look(state: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        if SHOTS:
            page.screenshot(path=SHOTS / f"study-{state}-{width}-{scheme}.png")
        faults.extend((state, *fault) for fault in faults_of(page, AXE))

    look("start")
    page.get_by_role("button", name="Start").click()
    page.wait_for_timeout(PAUSE)
    for name in ("#photo", "#left", "#right"):
        box = page.locator(name).bounding_box()
        assert 0 <= box["y"] <= height - box["height"], (name, box)
    look("question")
    for _ in range(20):
        answer(page, "left", "key")
    page.get_by_text("Thank you").wait_for()
    look("end")
    context.close()
    assert not faults, faults
    assert not wrong
