"""What a person does on the page of the studio, and what axe-core says of it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import TimeoutError


def opened(page: Any, tab: str) -> Any:
    page.get_by_role("tab", name=tab).click()
    panel = page.locator(f'.content[data-tab="{tab.lower()}"]')
    panel.wait_for()
    return panel


def setting(panel: Any, path: str, value: str) -> None:
    panel.locator(f'[id="{path}"]').fill(value)


def drawn(page: Any, drawing: Any, points: list[tuple[float, float]]) -> None:
    """Draws with the mouse on a photo, through points that are shares of its width and height."""
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def chosen(page: Any, panel: Any, field: str, option: str) -> None:
    """Chooses the option of a field that begins so; opens its menu again if a change of the page has closed it meanwhile."""
    entry = page.get_by_role("option", name=re.compile(f"^{re.escape(option)}"))
    for _ in range(3):
        panel.locator(f'[id="{field}"]').click()
        with suppress(TimeoutError):
            entry.click(timeout=5000)
            return
    entry.click()


def unfolded(panel: Any, title: str, field: str) -> None:
    """Opens a part of a form, unless it is open."""
    if not panel.locator(f'[id="{field}"]').is_visible():
        panel.locator(".q-expansion-item").get_by_text(title, exact=True).click()
        panel.locator(f'[id="{field}"]').wait_for()


def faults_of(page: Any, axe: Path) -> list[tuple[str, str, str]]:
    """Serious faults of accessibility: the rule, the element, the reason."""
    page.evaluate(axe.read_text())
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return [(fault["id"], node["html"][:200], node["failureSummary"][:300]) for fault in serious for node in fault["nodes"]]
