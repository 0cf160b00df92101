"""The studio in headless Chromium, used as a person would: photo, plan, fit, reload, edit, recall, sweep, compare, adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import AXE, REPO, Server, need

from imagic_lora.photos.reading import read_metadata

pytestmark = pytest.mark.web
PHOTO = REPO / "adapters/rex-jumps/source.png"
SLOW = 240_000  # milliseconds: the machine may be busy with other tests
SHOTS = Path(os.environ["IMAGIC_LORA_SCREENSHOTS"]) if "IMAGIC_LORA_SCREENSHOTS" in os.environ else None


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(30_000)
    yield context
    context.close()


@pytest.fixture(scope="module")
def page(context: Any, server: Server) -> Iterator[Any]:
    """One page for the whole story. Nothing may be asked of another machine, and no script may fail."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((server.url, "data:", "blob:")) else None)
    page.goto(server.url)
    yield page
    assert not wrong
    assert "Traceback" not in server.log(), server.log()


def opened(page: Any, tab: str) -> Any:
    page.get_by_role("tab", name=tab).click()
    panel = page.locator(".content").filter(visible=True)
    panel.wait_for()
    return panel


def setting(panel: Any, path: str, value: str) -> None:
    panel.locator(f'[id="{path}"]').fill(value)


def test_a_photo_and_its_plan_and_errors_beside_their_fields(page: Any):
    panel = opened(page, "Fit")
    panel.get_by_text("Predicted peak").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Start").click()
    panel.get_by_text("no photo. Expected: a photo").wait_for()
    panel.locator("input[type=file]").set_input_files(PHOTO)
    panel.locator(".preview img").first.wait_for()
    panel.get_by_role("button", name="Start").click()
    panel.get_by_text("--prompt is empty").wait_for()
    setting(panel, "prompt", "a dog <b>jumping</b><script>document.title='bad'</script>")
    setting(panel, "name", "rex-jumps")
    panel.get_by_role("button", name="Start").click()
    field = panel.locator(".q-field", has=page.locator('[id="name"]'))
    field.get_by_text("rex-jumps exists. Expected: an unused name").wait_for()
    panel.get_by_text("All settings").click()
    setting(panel, "tune.rank", "9999")
    panel.locator(".q-field", has=page.locator('[id="tune.rank"]')).get_by_text("less than or equal to 1024").wait_for(timeout=SLOW)
    setting(panel, "tune.rank", "2")


def test_a_fit_goes_on_while_the_page_is_reloaded(page: Any, server: Server):
    panel = opened(page, "Fit")
    setting(panel, "name", "newest")
    for path, value in (("embed.steps", "40"), ("tune.steps", "40"), ("edit.steps", "4"), ("monitoring.convergence_every", "10")):
        setting(panel, path, value)
    setting(panel, "monitoring.preview_every", "20")
    panel.get_by_role("button", name="Start").click()
    panel.get_by_text("Stage embed, step").wait_for(timeout=SLOW)
    page.reload()
    panel = page.locator(".content").filter(visible=True)
    panel.get_by_text("fit newest: done").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Open Preview after step 20").wait_for()
    assert page.title() == "imagic-lora"
    assert (server.store / "newest" / "adapter.json").is_file()


def test_an_edit_fills_a_grid_and_its_images_recall_their_settings(page: Any, tmp_path: Path):
    panel = opened(page, "Edit")
    panel.get_by_role("button", name="newest").click()
    panel.get_by_text("newest: a dog <b>jumping</b>").wait_for()
    setting(panel, "eta", "0.2,abc")
    panel.get_by_role("button", name="Generate").click()
    panel.get_by_text("--eta 0.2,abc. Expected: a number").wait_for()
    setting(panel, "eta", "0,0.8")
    setting(panel, "seed", "3")
    panel.locator(".q-expansion-item").get_by_text("Sampling", exact=True).click()
    setting(panel, "steps", "5")
    panel.get_by_role("button", name="Generate").click()
    panel.get_by_text("edit newest: done").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Open eta0.8-seed3").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("pixels_sha256").wait_for()
    dialog.get_by_role("slider", name="Share of the photo").press("ArrowRight")
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download with metadata").click()
    path = tmp_path / "image.png"
    download.value.save_as(path)
    assert read_metadata(path)["eta"] == 0.8
    setting(panel, "eta", "1")
    dialog.get_by_role("button", name="Use these again").click()
    assert panel.locator('[id="eta"]').input_value() == "0.8"
    for field in ("eta", "seed", "steps"):
        setting(panel, field, "1")
        panel.locator(f'[id="{field}"]').blur()
    panel.locator("input[type=file]").set_input_files(path)
    page.wait_for_timeout(500)
    page.wait_for_function("[...document.querySelectorAll('[id=\"eta\"]')].some(e => e.offsetParent && e.value === '0.8')")
    assert [panel.locator(f'[id="{field}"]').input_value() for field in ("seed", "steps")] == ["3", "5"]


def test_a_sweep_shows_its_sheet_and_suggests(page: Any):
    panel = opened(page, "Sweep")
    panel.get_by_role("button", name="rex-jumps").click()
    setting(panel, "eta", "0,0.5,1")
    setting(panel, "seeds", "1")
    panel.locator(".q-expansion-item").get_by_text("Sampling", exact=True).click()
    setting(panel, "steps", "2")
    panel.get_by_role("button", name="Start the sweep").click()
    panel.get_by_text("Suggested eta:").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Open sheet").wait_for()
    panel.get_by_role("img", name="Scores over eta").wait_for()


def test_methods_are_compared(page: Any):
    panel = opened(page, "Compare")
    panel.locator("input[type=file]").set_input_files(PHOTO)
    panel.locator(".preview img").first.wait_for()
    setting(panel, "prompt", "a dog jumping")
    setting(panel, "methods", "sdedit")
    panel.get_by_role("button", name="Compare").click()
    panel.get_by_text("compare a dog jumping: done").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Open sheet").wait_for()
    assert panel.get_by_role("link", name="Open the page").count() == 1


def test_adapters_are_searched_renamed_verified_exported_and_deleted(page: Any, server: Server):
    panel = opened(page, "Adapters")
    panel.get_by_label("search").fill("jumping")
    panel.get_by_text("2 adapters").wait_for()
    panel.get_by_role("button", name="Rename newest").click()
    dialog = page.get_by_role("dialog")
    dialog.locator('[id="name"]').fill("../x")
    dialog.get_by_role("button", name="Rename").click()
    dialog.get_by_text("is not a valid name").wait_for()
    dialog.locator('[id="name"]').fill("second")
    dialog.get_by_role("button", name="Rename").click()
    panel.get_by_text("Renamed newest to second").wait_for()
    dialog.wait_for(state="hidden")
    panel.get_by_role("button", name="Verify second").click()
    panel.get_by_text("Verified second: unchanged").wait_for()
    panel.get_by_role("button", name="Export second").click()
    page.get_by_role("dialog").get_by_role("button", name="Export").click()
    panel.get_by_role("link", name="Download").first.wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Delete second").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    panel.get_by_text("Deleted second").wait_for()
    assert not (server.store / "second").exists()


def test_the_queue_lists_all_jobs(page: Any):
    panel = opened(page, "Queue")
    for text in ("fit newest: done", "edit newest: done", "sweep rex-jumps: done"):
        panel.get_by_text(text).first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_tab_is_accessible_and_fits_the_window(browser: Any, server: Server, scheme: str, width: int):
    need(AXE, "axe-core (npm)")
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    page, faults = context.new_page(), []
    for tab in ("fit", "queue", "edit", "sweep", "compare", "adapters"):
        page.goto(f"{server.url}/?tab={tab}")
        page.locator(".content").filter(visible=True).wait_for()
        page.wait_for_timeout(700)
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        for fault in found:
            if fault["impact"] in ("serious", "critical"):
                faults += [(tab, fault["id"], node["html"][:200], node["failureSummary"][:300]) for node in fault["nodes"]]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        if SHOTS:
            page.screenshot(path=SHOTS / f"{tab}-{width}-{scheme}.png", full_page=True)
    context.close()
    assert not faults, "\n".join(map(str, faults))
