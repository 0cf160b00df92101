"""The studio in headless Chromium, used as a person would: photo, plan, fit, reload, edit, recall, sweep, compare, adapters."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acting import chosen, drawn, faults_of, opened, setting, unfolded
from conftest import AXE, REPO, SHOTS, SLOW, WINDOWS, Server, need, watched
from PIL import Image

from imagic_lora.photos.reading import read_mask, read_metadata, read_photo
from imagic_lora.web.jobs import ENDED, Job, Queue

pytestmark = pytest.mark.web
PHOTO = REPO / "adapters/rex-jumps/source.png"


@pytest.fixture(scope="module")
def page(browser: Any, server: Server) -> Iterator[Any]:
    """One page for the whole story."""
    with watched(browser, server, 30_000, accept_downloads=True) as page:
        page.goto(server.url)
        yield page


def finished(page: Any, server: Server, kind: str, before: int) -> Job:
    """Waits for the end of a job that is submitted as the next one of its kind, and returns it.

    Args:
        before: number of jobs of this kind before.
    """
    for _ in range(SLOW // 200):
        jobs = [job for job in Queue(server.store).jobs() if job.kind == kind]
        if len(jobs) > before and jobs[-1].state in ENDED:
            return jobs[-1]
        page.wait_for_timeout(200)
    raise AssertionError(f"no end of {kind}")


def count(server: Server, kind: str) -> int:
    return sum(job.kind == kind for job in Queue(server.store).jobs())


def test_a_finger_draws_a_region_and_a_reload_keeps_the_form(browser: Any, server: Server):
    """On a phone; typed numbers are drawn too. The form is kept in this tab of this browser, and no other one sees its photo."""
    context = browser.new_context(viewport={"width": 390, "height": 850}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server.url)
    panel = page.locator(".content").filter(visible=True)
    panel.locator(".subject input[type=file]").first.set_input_files(PHOTO)
    canvas = panel.locator(".subject .drawing canvas")
    page.wait_for_function("[...document.querySelectorAll('.drawing canvas')].some(e => e.width === 64)")
    box = canvas.bounding_box()
    touch = context.new_cdp_session(page)
    for kind, place in (("touchStart", (0.25, 0.25)), ("touchMove", (0.5, 0.6)), ("touchMove", (0.75, 0.75)), ("touchEnd", None)):
        at = [{"x": box["x"] + place[0] * box["width"], "y": box["y"] + place[1] * box["height"]}] if place else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})
    page.wait_for_function("document.getElementById('region').value === '16,16,32,32'")
    setting(panel, "region", "8,8,40,40")
    setting(panel, "prompt", "a dog in a hat")
    page.wait_for_function("JSON.parse(sessionStorage['imagic-lora fit'] || '{}').fields?.prompt === 'a dog in a hat'")
    page.wait_for_function("document.querySelector('.drawing canvas').getContext('2d').getImageData(8, 20, 1, 1).data[3] > 0")
    page.reload()
    page.wait_for_function("document.getElementById('region')?.value === '8,8,40,40'")
    panel = page.locator(".content").filter(visible=True)
    assert panel.locator('[id="prompt"]').input_value() == "a dog in a hat"
    canvas.wait_for()
    hostile = {"fields": {"prompt": 5, "tune.mode": "x", "tune.rank": "1", "name": ["a"]}, "more": {"photo": "../../etc/passwd", "name": 3}}
    page.evaluate("(text) => sessionStorage.setItem('imagic-lora fit', text)", json.dumps(hostile))
    page.reload()
    page.get_by_text("Predicted peak").wait_for(timeout=SLOW)
    assert [page.locator(f'[id="{field}"]').input_value() for field in ("prompt", "region", "name")] == ["", "", ""]
    assert canvas.filter(visible=True).count() == 0
    other = browser.new_page()
    other.goto(server.url)
    other.get_by_text("Predicted peak").wait_for(timeout=SLOW)
    assert other.locator('[id="prompt"]').input_value() == ""
    assert other.locator(".subject .drawing canvas").filter(visible=True).count() == 0
    guide = other.get_by_role("region", name="What happens here").filter(visible=True)  # no fit is in the queue yet
    guide.get_by_text("between the two embeddings lies the edit").wait_for()
    chosen(other, other.locator(".content").filter(visible=True), "method", "dreambooth")
    guide.get_by_text("a rare word before the noun names the subject").wait_for()
    assert not guide.get_by_text("between the two embeddings").is_visible()
    other.context.close()
    context.close()


def test_an_upload_without_a_length_ends_at_its_limit(browser: Any, server: Server):
    """200 MB in chunks to the address of an open page: refused on the way, and nothing is kept."""
    page, addresses = browser.new_page(), []
    page.on("request", lambda request: addresses.append(request.url) if request.method == "POST" else None)
    page.goto(server.url)
    page.locator(".subject input[type=file]").first.set_input_files(PHOTO)
    page.locator(".subject .drawing canvas").wait_for(timeout=SLOW)
    kept = set((server.store / ".web/uploads").iterdir())
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.putrequest("POST", addresses[0].removeprefix(server.url))
        for name, value in (("Origin", server.url), ("Content-Type", "multipart/form-data; boundary=x"), ("Transfer-Encoding", "chunked")):
            connection.putheader(name, value)
        connection.endheaders()
        head, block = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n', b"0" * 2**20
        with suppress(OSError):  # the server closes the connection
            for part in (head, *[block] * 200):
                connection.send(b"%x\r\n%s\r\n" % (len(part), part))
        assert connection.getresponse().status == 413
    assert set((server.store / ".web/uploads").iterdir()) == kept
    page.context.close()


def test_a_photo_and_its_plan_and_errors_beside_their_fields(page: Any):
    panel = opened(page, "Fit")
    panel.get_by_text("Predicted peak").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Start").click()
    panel.get_by_text("no photo. Expected: a photo").wait_for()
    panel.locator(".subject input[type=file]").first.set_input_files(PHOTO)
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
    for path, value in (("embed.steps", "10"), ("tune.steps", "4"), ("edit.steps", "4"), ("monitoring.convergence_every", "10")):
        setting(panel, path, value)
    setting(panel, "monitoring.preview_every", "4")
    panel.get_by_role("button", name="Start").click()
    panel.get_by_text("Stage embed, step").wait_for(timeout=SLOW)
    page.reload()
    panel = page.locator(".content").filter(visible=True)
    panel.get_by_text("fit newest: done").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="Open Preview after step 4").wait_for()
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
    dialog.locator(".q-slider [tabindex]").press("ArrowRight")
    dialog.locator(".before[style*='99%']").wait_for()
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download with metadata").click()
    path = tmp_path / "image.png"
    download.value.save_as(path)
    assert read_metadata(path)["eta"] == 0.8
    setting(panel, "eta", "1")
    dialog.get_by_role("button", name="Use these again").click()
    page.wait_for_function("[...document.querySelectorAll('[id=\"eta\"]')].some(e => e.offsetParent && e.value === '0.8')")
    for field in ("eta", "seed", "steps"):
        setting(panel, field, "1")
        panel.locator(f'[id="{field}"]').blur()
    panel.locator("input[type=file]").last.set_input_files(path)
    page.wait_for_timeout(500)
    page.wait_for_function("[...document.querySelectorAll('[id=\"eta\"]')].some(e => e.offsetParent && e.value === '0.8')")
    assert [panel.locator(f'[id="{field}"]').input_value() for field in ("seed", "steps")] == ["3", "5"]


def test_a_mask_is_painted_or_a_file_and_what_it_leaves_stays(page: Any, server: Server, tmp_path: Path):
    panel = opened(page, "Edit")
    panel.get_by_role("button", name="rex-jumps").click()
    panel.get_by_text("rex-jumps: a dog").wait_for()
    unfolded(panel, "Sampling", "steps")
    for field, value in (("eta", "1"), ("seed", "5"), ("steps", "2")):
        setting(panel, field, value)
    chosen(page, panel, "keep", "mask:")
    canvas = panel.locator(".drawing canvas").filter(visible=True)
    canvas.wait_for()
    panel.get_by_role("button", name="Generate").click()
    panel.get_by_text("--keep without a mask").wait_for()
    for _ in range(6):
        panel.locator(".brush [tabindex]").press("ArrowRight")
    panel.locator('.drawing[data-brush^="0.1"]').wait_for()
    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    panel.locator(".mask input[type=file]").last.set_input_files(tmp_path / "mask.png")
    panel.get_by_text("has 9x9 pixels. Expected: the size of the photo, 64x64 pixels").wait_for()
    drawn(page, canvas, [(0.5, 0.2), (0.5, 0.8)])
    panel.get_by_text("Painted: what is coloured may change").wait_for()
    draft = "JSON.parse(sessionStorage['imagic-lora edit']).more.mask.painted"
    page.wait_for_function(f"{draft}.length > 99")
    painted = page.evaluate(draft)
    panel.get_by_role("button", name="Erase").click()
    panel.locator(".drawing[data-tool=erase]").wait_for()
    drawn(page, canvas, [(0.2, 0.8), (0.8, 0.8)])
    page.wait_for_function(f"(painted) => {draft} !== painted", arg=painted)
    page.reload()
    panel = page.locator(".content").filter(visible=True)
    panel.get_by_text("Painted: what is coloured may change").wait_for()
    edits = count(server, "edit")
    panel.get_by_role("button", name="Generate").click()
    job = finished(page, server, "edit", edits)
    assert job.state == "done", job
    mask = np.asarray(read_mask(server.store / ".web" / job.arguments["keep"], (64, 64)).image)
    assert (mask[16:32, 32] == 255).all()  # painted
    assert (mask[32, 28:36] == 255).all()  # by a larger brush
    assert (mask[48:54, 32] == 0).all()  # erased
    assert (mask[:, :16] == 0).all()
    panel.get_by_role("button", name="Open eta1-seed5").click()
    with page.expect_download() as download:
        page.get_by_role("dialog").get_by_role("link", name="Download with metadata").click()
    download.value.save_as(tmp_path / "image.png")
    images = [np.asarray(read_photo(path).image) for path in (tmp_path / "image.png", PHOTO)]
    assert (images[0][mask == 0] == images[1][mask == 0]).all()
    assert (images[0] != images[1]).any()
    page.get_by_role("dialog").get_by_role("button", name="Use these again").click()
    panel.get_by_text("From a file").wait_for()
    chosen(page, panel, "keep", "auto:")
    panel.get_by_role("button", name="Generate").click()
    job = finished(page, server, "edit", edits + 1)
    assert (job.state, job.arguments["keep"]) == ("done", "auto"), job


def test_an_adapter_of_a_new_word_has_no_eta(page: Any, server: Server):
    """The controls of eta and --keep go, and the edit is generated without them."""
    queue = Queue(server.store)
    shutil.copyfile(PHOTO, queue.root / "uploads" / "word.png")
    settings: dict[str, Any] = {"base": "critters", "method": "textual-inversion", "inversion": {"initial_word": "dog"}}
    settings |= {"embed": {"steps": 2}, "edit": {"steps": 2}, "memory": {"device": "cpu"}}
    queue.submit("fit", {"image": "uploads/word.png", "prompt": "a photo of <my-dog>", "name": "word", "settings": settings})
    job = finished(page, server, "fit", count(server, "fit") - 1)
    assert job.state == "done", job
    panel = opened(page, "Edit")
    panel.get_by_role("button", name="rex-jumps").click()
    panel.get_by_label("Eta", exact=True).first.wait_for()
    page.reload()
    panel = page.locator('.content[data-tab="edit"]')
    panel.get_by_text("lower keeps more of the photo").wait_for()  # the draft is restored
    panel.get_by_role("button", name="word").click()
    panel.get_by_text("An adapter of method textual-inversion has no eta").wait_for()
    panel.locator('[id="eta"]').wait_for(state="hidden")
    assert not panel.locator('[for="keep"]').first.is_visible()
    panel.get_by_role("button", name="Generate").click()
    panel.get_by_text("edit word: done").wait_for(timeout=SLOW)
    panel.get_by_role("button", name="rex-jumps").click()
    panel.locator('[id="eta"]').wait_for()


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
    chart = panel.get_by_role("img", name="Scores over eta")
    chart.scroll_into_view_if_needed()
    number = int((chart.get_attribute("id") or "c0")[1:])
    page.wait_for_function("(number) => getElement(number).chart?.convertToPixel({seriesIndex: 0}, [0, 0])", arg=number)
    x, y = page.evaluate(
        "(number) => { const chart = getElement(number).chart, [series] = chart.getOption().series;"
        "return chart.convertToPixel({seriesIndex: 0}, series.data.find(([eta]) => eta === 0.5).slice(0, 2)) }",
        number,
    )
    box = chart.bounding_box()
    page.mouse.click(box["x"] + x, box["y"] + y)
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("0.5", exact=True).wait_for()
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="hidden")
    panel.get_by_role("row", name="0 Open eta0-seed0").get_by_role("button", name="Open eta1-seed0").press("Enter")
    dialog.get_by_role("button", name="Use these again").click()
    dialog.wait_for(state="hidden")
    panel = page.locator(".content").filter(visible=True)
    page.wait_for_function("document.getElementById('eta').offsetParent && document.getElementById('eta').value === '1'")
    assert panel.locator('[id="steps"]').input_value() == "2"


def test_methods_are_compared(page: Any, server: Server):
    panel = opened(page, "Compare")
    panel.locator(".subject input[type=file]").set_input_files(PHOTO)
    panel.locator(".preview img").first.wait_for()
    setting(panel, "prompt", "a dog jumping")
    setting(panel, "methods", "sdedit")
    setting(panel, "settings", "strength=7")
    panel.get_by_role("button", name="Compare").click()
    panel.locator(".q-field", has=page.locator('[id="settings"]')).get_by_text("strength").wait_for(timeout=SLOW)
    setting(panel, "settings", "strength=0.6\nsteps=4")
    panel.get_by_text("Scores and captions by other models").click()
    setting(panel, "clip", "nobody/nothing")
    chosen(page, panel, "offline", "yes")
    panel.get_by_role("button", name="Compare").click()
    panel.locator(".q-field", has=page.locator('[id="clip"]')).get_by_text("--clip nobody/nothing cannot be loaded").wait_for(timeout=SLOW)
    setting(panel, "clip", "")
    chosen(page, panel, "offline", "default")
    setting(panel, "methods", "blended-latent")
    setting(panel, "settings", "steps=4")
    panel.get_by_text("Mask: what may change").click()
    canvas = panel.locator(".mask .drawing canvas").filter(visible=True)
    page.wait_for_function("[...document.querySelectorAll('.mask .drawing canvas')].some(e => e.offsetParent && e.width === 64)")
    drawn(page, canvas, [(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.3)])
    panel.get_by_text("Painted: what is coloured may change").wait_for()
    compared = count(server, "compare")
    panel.get_by_role("button", name="Compare").click()
    arguments = finished(page, server, "compare", compared).arguments
    panel.get_by_text("compare a dog jumping: done").wait_for(timeout=SLOW)
    assert (arguments["settings"], arguments["mask"][:8]) == (["steps=4"], "uploads/")
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


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_every_tab_is_accessible_and_fits_the_window(browser: Any, server: Server, width: int, scheme: str):
    need(AXE, "axe-core (npm)")
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    page, faults = context.new_page(), []
    page.goto(server.url)
    for tab in ("Fit", "Queue", "Edit", "Sweep", "Compare", "Adapters"):
        opened(page, tab)
        page.wait_for_timeout(700)
        faults += [(tab, *fault) for fault in faults_of(page, AXE)]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        if SHOTS:
            page.screenshot(path=SHOTS / f"{tab.lower()}-{width}-{scheme}.png", full_page=True)
    context.close()
    assert not faults, "\n".join(map(str, faults))
