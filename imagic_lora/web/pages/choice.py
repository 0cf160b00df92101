"""The gallery of adapters, of which a form takes one."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from ...adapters.adapter import Adapter
from ...adapters.record import PREVIEW
from ...core.errors import ImagicError
from ..studio import Studio
from .forms import Form


def gallery(studio: Studio, choose: Any) -> ui.row:
    """Shows the adapters as buttons with their preview.

    Args:
        studio: the studio.
        choose: called with the name of one that is pressed.
    """
    with ui.row().classes("strip").props('role="group" aria-label="Adapters"') as row:
        names = studio.store.names()
        for name in names:
            with ui.element("button").classes("thumb").props(f'type="button" data-adapter="{name}"') as button:
                ui.element("img").props(f'src="/adapters/{name}/preview.png" alt="" loading="lazy"')
                ui.label(name)
            button.on("click", lambda name=name: choose(name))
        if not names:
            ui.label("No adapters yet. Fit a photo first.")
    return row


class Choice:
    """The gallery with one adapter chosen, and its settings as the defaults of a form.

    Args:
        studio: the studio.
        form: the form.
        chosen: called when another adapter is chosen.
    """

    def __init__(self, studio: Studio, form: Form, chosen: Any = None) -> None:
        self.adapter: Adapter | None = None
        self._picture: ui.element | None = None
        self._studio, self._form, self._chosen = studio, form, chosen
        self._names = studio.store.names()
        self._place = ui.element("div")
        with self._place:
            self._row = gallery(studio, self.choose)
        self._label = ui.label("Choose an adapter").classes("heading").props('role="status"')
        ui.timer(2.0, self._refresh)

    def shown(self) -> None:
        """Places the picture of the adapter that is chosen: its photo, and what eta did to it after the fit."""
        with ui.element("div").classes("subject"):
            self._picture = ui.element("img").classes("shown").props('alt="The photo and edits of the adapter"')
        self._picture.visible = False

    def choose(self, name: str) -> None:
        """Chooses an adapter."""
        try:
            self.adapter = self._studio.store.read(name, verify=False)
        except ImagicError as error:
            self._form.show(error)
            return
        record = self.adapter.record
        self._label.text = f"{name}: {record.prompt} ({record.base.name}, {record.config.tune.mode})"
        for button in self._row.default_slot.children:
            chosen = "true" if button.props.get("data-adapter") == name else "false"
            button.props(f'aria-pressed="{chosen}"')
        if self._picture:
            self._picture.props["src"] = f"/adapters/{name}/preview.png"
            self._picture.visible = PREVIEW in record.files  # an adapter that was sent without its photo has none
        if self._chosen:
            self._chosen(self.adapter)

    def name(self) -> str:
        """Returns the name of the adapter.

        Raises:
            ImagicError: none is chosen.
        """
        if self.adapter is None:
            raise ImagicError("no adapter is chosen", "an adapter", "press one in the gallery")
        return self.adapter.name

    def _refresh(self) -> None:
        """Shows adapters that came or went."""
        names = self._studio.store.names()
        if names != self._names:
            self._names = names
            self._place.clear()
            with self._place:
                self._row = gallery(self._studio, self.choose)
