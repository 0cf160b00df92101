"""One image in full size: before and after, its settings, download, and their use for another edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import ui

from ...core.errors import ImagicError
from ...photos.reading import read_metadata


def thumbnail(url: str, label: str, opened: Callable[[], Any]) -> None:
    """Shows an image as a button.

    Args:
        url: its address.
        label: its name.
        opened: called when it is pressed.
    """
    with ui.element("button").classes("thumb").props(f'type="button" aria-label="Open {label}"') as button:
        ui.element("img").props(f'src="{url}" alt="{label}" loading="lazy"')
        ui.label(label)
    button.on("click", opened)


def show_picture(path: Path, url: str, before: str | None, use: Callable[[dict[str, Any]], Any] | None) -> None:
    """Opens an image.

    Args:
        path: its file.
        url: its address.
        before: the address of the photo that it came from.
        use: called with its metadata by "Use these again".
    """
    try:
        metadata: dict[str, Any] = read_metadata(path)
    except ImagicError:
        metadata = {}
    dialog = ui.dialog().props('maximized aria-label="Image"')
    dialog.on("hide", dialog.delete)
    with dialog, ui.card().classes("picture"):
        with ui.row().classes("buttons"):
            ui.button("Close", on_click=dialog.close).props("outline")
            if use and "eta" in metadata:
                ui.button("Use these again", on_click=lambda: (dialog.close(), use(metadata)))
            ui.link("Download with metadata", f"{url}?download=1").classes("download")
        with ui.element("div").classes("compare"):
            ui.html(f'<img src="{url}" alt="The edited image">', sanitize=False)
            over = ui.html(f'<img src="{before}" alt="The photo">' if before else "", sanitize=False).classes("before")
        if before:
            ui.label("Before / after")
            slider = ui.slider(min=0, max=100, value=0).props('aria-label="Share of the photo that is shown"').classes("field")
            slider.on_value_change(lambda: over.style(f"clip-path: inset(0 {100 - (slider.value or 0)}% 0 0)"))
        over.style("clip-path: inset(0 100% 0 0)")
        if metadata:
            with ui.expansion("Settings of this image", value=True).classes("field"), ui.element("dl").classes("facts"):
                for name, value in metadata.items():
                    with ui.element("dt"):
                        ui.label(name)
                    with ui.element("dd"):
                        ui.label(value if isinstance(value, str) else json.dumps(value))
    dialog.open()
