"""A studio in a process of its own, and a page of it in headless Chromium."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(sys.prefix) / "axe/node_modules/axe-core/axe.min.js"
SLOW = 240_000  # milliseconds: the machine may be busy with other tests
SHOTS = Path(os.environ["IMAGIC_LORA_SCREENSHOTS"]) if "IMAGIC_LORA_SCREENSHOTS" in os.environ else None
_EVERY = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
WINDOWS = _EVERY if SHOTS else [(390, "dark"), (1280, "light")]
"""Width in pixels and colour scheme of the windows that pages are looked at in: every one where screenshots are asked for; else two, in
which each width and each scheme occurs, since the layout does not depend on the colours."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


def need(path: Path, what: str) -> None:
    """Skips the test where something is not installed; fails it where CI demands it."""
    if not path.exists():
        if os.environ.get("IMAGIC_LORA_WEB_TESTS") == "required":
            pytest.fail(f"{what} is not installed: {path}")
        pytest.skip(f"{what} is not installed: {path}")


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``imagic-lora web`` on a store that holds the two example adapters.

    Args:
        folder: of the store and the log.
        flags: of the command.
        before: code that runs in the process of the server before the command.
    """

    def __init__(self, folder: Path, *flags: str, before: str = "") -> None:
        self.folder, self.flags, self.port = folder, flags, free_port()
        self.before = before
        self.store = folder / "store"
        self.url = f"http://127.0.0.1:{self.port}"
        if not self.store.exists():
            for name in ("rex-jumps", "mia-wears-a-hat"):
                shutil.copytree(REPO / "adapters" / name, self.store / name)
        self.start()

    def start(self) -> None:
        program = (
            ["-c", f"{self.before}; import runpy; runpy.run_module('imagic_lora', run_name='__main__')"]
            if self.before
            else ["-m", "imagic_lora"]
        )
        command = [sys.executable, *program, "web", "--port", str(self.port), "--store", str(self.store), "--base", "critters"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # NiceGUI reads them
        environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], stdout=log, stderr=log, env=environment)
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("studio"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    need(CHROMIUM, "Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Any, server: Server, patience: int, **options: Any) -> Iterator[Any]:
    """A page in a window of its own. Nothing may be asked of another machine, no script may fail, and no error may reach the log.

    Args:
        browser: headless Chromium.
        server: the studio.
        patience: milliseconds that the page waits for an element.
        options: of the window.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(patience)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((server.url, "data:", "blob:")) else None)
    yield page
    assert not wrong
    assert "Traceback" not in server.log(), server.log()
    context.close()
