"""Load on the studio: 32 clients ask for edits at once, each in a page of its own, and each must get its own pictures.

Run it by ``PYTHONPATH=tests/web python tests/web/load.py``; it prints one line of figures.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import psutil
from conftest import ARGUMENTS, CHROMIUM, Server
from playwright.sync_api import Page, sync_playwright

from imagic_lora.photos.reading import read_metadata
from imagic_lora.web.jobs import Queue

CLIENTS = 32


def main() -> None:
    """Opens the pages, presses every button, and compares what came."""
    server = Server(Path(tempfile.mkdtemp()))
    memory, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            memory[0] = max(memory[0], psutil.Process(server.process.pid).memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        pages = [browser.new_page() for _ in range(CLIENTS)]
        for page in pages:
            page.set_default_timeout(500_000)
        start = time.monotonic()
        for page in pages:
            page.goto(f"{server.url}/?tab=edit", wait_until="commit")
        for seed, page in enumerate(pages):
            ask(page, seed)
        asked = time.monotonic() - start
        right = sum(answered(page, seed) for seed, page in enumerate(pages))
        took = time.monotonic() - start
        browser.close()
    queue = Queue(server.store)
    for job in queue.jobs():
        pictures = list((queue.folder(job.id) / "out").glob("eta*.png"))
        assert [read_metadata(path)["seed"] for path in pictures] == [int(job.arguments["seed"])], job
    done.set()
    server.close()
    times = f"asked within {asked:.0f} s, all answered after {took:.0f} s"
    print(f"{right} of {CLIENTS} right, {times}, server at most {memory[0] / 2**20:.0f} MB")


def ask(page: Page, seed: int) -> None:
    """Asks for an edit with a seed of its own."""
    page.get_by_role("button", name="rex-jumps").click()
    page.get_by_text("rex-jumps: a dog").wait_for()
    page.locator('[id="eta"]').fill("0.7")
    page.locator('[id="seed"]').fill(str(seed))
    page.locator(".q-expansion-item").get_by_text("Sampling", exact=True).click()
    page.locator('[id="steps"]').fill("2")
    page.get_by_role("button", name="Generate").click()


def answered(page: Page, seed: int) -> bool:
    """Waits for the end of the edit; whether the page shows the picture of its own seed and no other."""
    page.get_by_text("edit rex-jumps: done").wait_for()
    page.get_by_role("button", name="Open eta").first.wait_for()
    names = page.get_by_role("button", name="Open eta").all_inner_texts()
    return names == [f"eta0.7-seed{seed}"]


if __name__ == "__main__":
    main()
