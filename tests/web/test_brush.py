"""The brush, several photos, and drafts in headless Chromium: what is painted is what the commands get."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acting import chosen, drawn, faults_of, opened, setting
from conftest import AXE, REPO, SHOTS, SLOW, WINDOWS, Server, need, watched
from PIL import Image

from imagic_lora.photos.reading import read_mask
from imagic_lora.web.jobs import Job, Queue
from imagic_lora.web.supervisor import Supervisor

pytestmark = pytest.mark.web
PHOTO = REPO / "adapters/rex-jumps/photo.png"  # the photo of an adapter of the store, 64 x 64 pixels
PAINTED = "JSON.parse(sessionStorage['imagic-lora fit'] || '{}').more?.mask?.painted"


@pytest.fixture(scope="module")
def page(browser: Any, server: Server) -> Iterator[Any]:
    with watched(browser, server, 60_000, has_touch=True) as page:
        yield page


def pixels(url: str) -> np.ndarray:
    """The painted pixels of a ``data:`` URL; none for an empty one."""
    if not url:
        return np.zeros((64, 64), dtype=bool)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image.convert("L").resize((64, 64))) > 127


def changed(page: Any, before: str) -> str:
    """The painted mask, when the draft has another one than before."""
    page.wait_for_function(f"(before) => ({PAINTED} ?? '') !== before", arg=before)
    return str(page.evaluate(f"{PAINTED} ?? ''"))


def look(page: Any, name: str) -> None:
    """No serious fault, and nothing wider than the window, in each of the windows."""
    need(AXE, "axe-core (npm)")
    faults = []
    page.add_style_tag(content="* { transition: none !important; }")  # colours between light and dark are no fault
    for width, scheme in WINDOWS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.locator(f"body.body--{scheme}").wait_for()
        page.wait_for_timeout(300)
        faults += [(name, width, scheme, *fault) for fault in faults_of(page, AXE)]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
        if SHOTS:
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    assert not faults, "\n".join(map(str, faults))


def taken(page: Any, server: Server, kind: str) -> Job:
    """The next job of a kind, which is cancelled as soon as it is there: a test of what it gets, not of what it does."""
    queue = Queue(server.store)
    for _ in range(SLOW // 100):
        jobs = [job for job in queue.jobs() if job.kind == kind and job.state in ("queued", "running")]
        if jobs:
            Supervisor(queue).cancel(jobs[-1].id)
            return jobs[-1]
        page.wait_for_timeout(100)
    raise AssertionError(f"no {kind}")


def mask_of(server: Server, stored: str) -> np.ndarray:
    """The pixels that the command reads: whether they may change."""
    return np.asarray(read_mask(server.store / ".web" / stored, (64, 64)).image) == 255


def test_a_mask_is_painted_undone_inverted_and_becomes_that_of_edit_and_compare(page: Any, server: Server) -> None:
    """With the mouse and with keys; the mask belongs to the photo, so it is chosen for its adapter and its comparison."""
    page.goto(server.url)
    panel = opened(page, "Fit")
    panel.get_by_text("Mask: what edits may change").click()  # the tick stays when the photo arrives
    panel.locator(".subject input[type=file]").first.set_input_files(PHOTO)
    canvas = panel.locator(".mask .drawing canvas[role=application]").filter(visible=True)
    page.wait_for_function("[...document.querySelectorAll('canvas[role=application]')].some(e => e.offsetParent && e.width === 64)")
    drawn(page, canvas, [(0.1, 0.25), (0.9, 0.25)])
    first = changed(page, "")
    assert pixels(first)[16, 8:56].all()
    assert not pixels(first)[32:].any()
    drawn(page, canvas, [(0.5, 0.6), (0.5, 0.9)])
    second = changed(page, first)
    assert pixels(second)[40:56, 32].all()
    panel.get_by_role("button", name="Undo").filter(visible=True).click()
    assert changed(page, second) == first
    page.wait_for_function("document.querySelector('canvas[role=application]').getContext('2d').getImageData(32, 48, 1, 1).data[3] === 0")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "Space", "Shift+ArrowRight", "Shift+ArrowRight", "Space"):
        canvas.press(key)
    third = changed(page, first)
    assert pixels(third)[34:36, 32:44].all()  # from the middle and two small steps down, two large ones to the right
    assert not pixels(third)[34:36, :28].any()
    canvas.press("Control+z")
    assert changed(page, third) == first
    panel.get_by_role("button", name="Invert").filter(visible=True).click()
    inverted = changed(page, first)
    assert (pixels(inverted) == ~pixels(first)).all()
    look(page, "fit-mask")
    setting(panel, "prompt", "a dog jumping")
    setting(panel, "name", "masked")
    panel.get_by_role("button", name="Start").click()
    assert taken(page, server, "fit").arguments["name"] == "masked"
    panel = opened(page, "Edit")
    panel.get_by_role("button", name="rex-jumps").click()
    panel.get_by_text("The mask of this photo, from its fit").wait_for()
    panel.get_by_role("button", name="Generate").click()
    assert (mask_of(server, taken(page, server, "edit").arguments["keep"]) == pixels(inverted)).all()
    panel.get_by_role("button", name="mia-wears-a-hat").click()  # another photo
    panel.get_by_text("mia-wears-a-hat:").wait_for()
    panel.get_by_role("button", name="Generate").click()
    assert "keep" not in taken(page, server, "edit").arguments
    panel = opened(page, "Compare")
    panel.locator(".subject input[type=file]").set_input_files(PHOTO)
    panel.get_by_text("The mask of this photo, from its fit").wait_for()
    panel.get_by_role("button", name="Invert").filter(visible=True).click()
    panel.get_by_text("from its fit").wait_for()
    setting(panel, "prompt", "a dog jumping")
    setting(panel, "subject", "dog")
    panel.get_by_role("button", name="Compare").click()
    arguments = taken(page, server, "compare").arguments
    assert (mask_of(server, arguments["mask"]) == pixels(first)).all()
    assert arguments["subject"] == "dog"


def test_a_finger_paints_on_a_phone(browser: Any, server: Server) -> None:
    """The photo of the first fit has its mask again; a stroke of the finger adds to it, and without a mask the photo has none."""
    context = browser.new_context(viewport={"width": 390, "height": 850}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    panel = page.locator(".content").filter(visible=True)
    panel.locator(".subject input[type=file]").first.set_input_files(PHOTO)
    panel.get_by_text("The mask of this photo, from an earlier fit").wait_for()
    panel.get_by_role("group", name="Mask").get_by_role("button", name="Clear").click()
    page.wait_for_function(f"!({PAINTED})")  # the draft, too
    canvas = panel.locator("canvas[role=application]").filter(visible=True)
    canvas.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('canvas[role=application]').getContext('2d').getImageData(1, 60, 1, 1).data[3] === 0")
    box, touch = canvas.bounding_box(), context.new_cdp_session(page)
    for kind, place in (("touchStart", (0.5, 0.2)), ("touchMove", (0.5, 0.5)), ("touchMove", (0.5, 0.8)), ("touchEnd", None)):
        at = [{"x": box["x"] + place[0] * box["width"], "y": box["y"] + place[1] * box["height"]}] if place else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})
    painted = pixels(changed(page, ""))
    assert painted[16:48, 32].all()
    assert not painted[:, :24].any()
    panel.get_by_text("Mask: what edits may change").click()
    setting(panel, "prompt", "a dog jumping")
    setting(panel, "name", "unmasked")
    panel.get_by_role("button", name="Start").click()
    taken(page, server, "fit")
    panel.locator(".subject input[type=file]").first.set_input_files(PHOTO)
    page.wait_for_timeout(1000)
    assert not panel.get_by_text("from an earlier fit").is_visible()
    context.close()


def test_several_photos_and_their_settings_for_a_subject(page: Any, server: Server, tmp_path: Path) -> None:
    """Chosen as files and as a folder; the settings of the method are those that it reads; a reload keeps all."""
    for k, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "dogs").mkdir(exist_ok=True)
        Image.new("RGB", (40 + k, 30), colour).save(tmp_path / "dogs" / f"{k}.png")
    page = page.context.new_page()
    page.goto(server.url)
    panel = opened(page, "Fit")
    chosen(page, panel, "method", "dreambooth")
    photos = panel.get_by_role("group", name="Photos")
    with page.expect_file_chooser() as chooser:
        photos.get_by_role("button", name="Choose a folder").click()
    chooser.value.set_files(tmp_path / "dogs")
    photos.get_by_text("3 photos").wait_for()
    photos.get_by_role("button", name="Remove photo 1").click()
    photos.get_by_text("2 photos").wait_for()
    photos.locator("input[type=file]").evaluate("(input) => { input.webkitdirectory = false }")
    photos.locator("input[type=file]").set_input_files([PHOTO, tmp_path / "dogs/0.png"])
    photos.get_by_text("4 photos").wait_for()
    assert [panel.locator(f'[id="{one}"]').is_visible() for one in ("dreambooth.class_prompt", "inversion.vectors")] == [True, False]
    assert not panel.get_by_text("Mask: what edits may change").is_visible()
    setting(panel, "prompt", "a photo of sks dog")
    setting(panel, "name", "subject")
    setting(panel, "dreambooth.class_pictures", "0")
    panel.get_by_text("greater than or equal to 1").wait_for(timeout=SLOW)  # from the config model
    setting(panel, "dreambooth.class_pictures", "7")
    setting(panel, "dreambooth.class_prompt", "a photo of a dog")
    look(page, "fit-photos")
    page.wait_for_function("JSON.parse(sessionStorage['imagic-lora fit']).fields['dreambooth.class_prompt'] === 'a photo of a dog'")
    page.reload()
    panel = page.locator('.content[data-tab="fit"]')
    photos = panel.get_by_role("group", name="Photos")
    photos.get_by_text("4 photos").wait_for()
    panel.get_by_role("button", name="Start").click()
    arguments = taken(page, server, "fit").arguments
    assert len(list((server.store / ".web" / arguments["image"]).iterdir())) == 4
    assert arguments["settings"]["method"] == "dreambooth"
    assert arguments["settings"]["dreambooth"] == {"class_prompt": "a photo of a dog", "class_pictures": 7}
    assert not {"region", "store_photo"} & set(arguments)
    chosen(page, panel, "method", "imagic")
    panel.get_by_text("Mask: what edits may change").wait_for()
    assert not photos.is_visible()
    assert "Traceback" not in server.log(), server.log()
    page.close()


HOLD = """
    const get = Storage.prototype.getItem;
    window.held = new Promise((resolve) => { window.release = resolve; });
    Storage.prototype.getItem = function (key) {
        const value = get.call(this, key);
        return key === "imagic-lora edit" && !window.open_ ? window.held.then(() => value) : value;
    };
"""


def test_a_click_before_the_draft_is_restored_is_not_undone(page: Any, server: Server) -> None:
    """The browser gives the draft only when the test says so: until then the tab takes no click, afterwards a click stays."""
    from playwright.sync_api import Error

    page = page.context.new_page()
    page.goto(f"{server.url}/?tab=edit")
    page.get_by_role("button", name="mia-wears-a-hat").click()
    page.wait_for_function("JSON.parse(sessionStorage['imagic-lora edit'] || '{}').more?.adapter === 'mia-wears-a-hat'")
    page.add_init_script(HOLD)
    page.reload()
    other = page.get_by_role("button", name="rex-jumps")
    other.wait_for()
    with pytest.raises(Error, match="Timeout"):
        other.click(timeout=2000)
    assert page.locator('.content[data-tab="edit"]').evaluate("(tab) => tab.inert")
    page.evaluate("window.release()")
    page.get_by_text("mia-wears-a-hat: a cat").wait_for()
    other.click()
    page.get_by_text("rex-jumps: a dog").wait_for()
    page.wait_for_timeout(1000)
    assert page.get_by_text("rex-jumps: a dog").is_visible()
    page.close()
