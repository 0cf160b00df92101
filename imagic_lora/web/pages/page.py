"""The page: its header, its tabs, its colours. A tab is built when it is opened for the first time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import ui

from ..studio import Studio
from .adapters import AdaptersTab
from .compare import CompareTab
from .edit import EditTab
from .fit import FitTab
from .jobview import Use
from .queue import QueueTab
from .sweep import SweepTab

TABS: dict[str, Callable[[Studio, Use], Any]] = {
    "fit": FitTab, "queue": QueueTab, "edit": EditTab, "sweep": SweepTab, "compare": CompareTab, "adapters": AdaptersTab,
}  # fmt: skip
_STYLE = (Path(__file__).parent / "style.css").read_text("utf-8")


def build(studio: Studio, tab: str) -> None:
    """Builds the page for one browser tab.

    Args:
        studio: the studio.
        tab: the tab that is open at first.
    """
    ui.add_css(_STYLE)
    built: dict[str, Any] = {}

    def opened(name: str) -> None:
        ui.run_javascript(f"history.replaceState(null, '', '/?tab={name}')")
        if name not in built:
            with panels[name], ui.element("div").classes("content").props(f'data-tab="{name}"'):
                built[name] = TABS[name](studio, use)

    def use(metadata: dict[str, Any]) -> None:
        tabs.set_value("edit")
        built["edit"].use(metadata)

    with ui.header().classes("header"):
        ui.label("imagic-lora").classes("title").props('role="heading" aria-level="1"')
        with ui.tabs(on_change=lambda event: opened(str(event.value))).props("dense mobile-arrows outside-arrows align=left") as tabs:
            for name in TABS:
                ui.tab(name, label=name.capitalize())
    start = tab if tab in TABS else "fit"
    with ui.element("main"), ui.tab_panels(tabs, value=None, animated=False).props("keep-alive").classes("panels"):
        panels = {name: ui.tab_panel(name) for name in TABS}
    tabs.set_value(start)
