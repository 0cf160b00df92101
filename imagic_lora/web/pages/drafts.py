"""A form that is half filled in survives a reload: it is kept in the browser's own tab (sessionStorage), and nowhere on the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement

from ...core.errors import ImagicError

_PATIENCE = 30.0  # seconds for a busy browser to answer


class Draft:
    """What a form holds, in the browser.

    Until it is restored the place where it is made takes no input: a restored draft would undo a click that comes before it.

    Args:
        name: of the form.
        fields: its elements by name.
        more: returns what else belongs to it, as JSON.
        restore: takes this back, before the fields are filled. The browser may hold anything: it must check what it gets.
    """

    def __init__(
        self,
        name: str,
        fields: Mapping[str, Any],
        more: Callable[[], dict[str, Any]] = dict,
        restore: Callable[[dict[str, Any]], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._key = json.dumps(f"imagic-lora {name}")
        self._more, self._restore, self._ready = more, restore, False
        self._place = ui.context.slot.parent
        self._place.props("inert")
        self._fields = {name: element for name, element in fields.items() if isinstance(element, ValueElement)}
        for element in self._fields.values():
            element.on_value_change(self.save)
        ui.timer(0.0, self._load, once=True)

    def save(self) -> None:
        """Writes what the form holds now. The form calls it where something else than a field changes."""
        if not self._ready:
            return
        values = {name: element.value for name, element in self._fields.items()}
        ui.run_javascript(f"sessionStorage.setItem({self._key}, {json.dumps(json.dumps({'fields': values, 'more': self._more()}))})")

    def replace(self) -> None:
        """Keeps what the form holds, and what it will hold, instead of what the browser has."""
        self._ready = True
        self._place.props(remove="inert")

    async def _load(self) -> None:
        """Fills the form."""
        with suppress(TimeoutError, ValueError, TypeError, AttributeError):  # no draft, or one of another version: an empty form
            text = await ui.run_javascript(f"return sessionStorage.getItem({self._key})", timeout=_PATIENCE)
            if self._ready:
                return
            found = json.loads(text) if isinstance(text, str) else {}
            if self._restore and isinstance(found.get("more"), dict):
                with suppress(ImagicError, KeyError, TypeError, ValueError, AttributeError):  # what it names is gone
                    await self._restore(found["more"])
            for name, value in found.get("fields", {}).items():
                self._fill(name, value)
        self.replace()

    def _fill(self, name: str, value: Any) -> None:
        """Fills a field, if the value is one that it can hold."""
        element = self._fields.get(name)
        if element is None:
            return
        if isinstance(element, ui.select):
            fits = value in element.options
        elif isinstance(element, (ui.number, ui.slider)):
            fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        else:
            fits = isinstance(value, bool) if isinstance(element, ui.checkbox) else value is None or isinstance(value, str)
        if fits:
            setattr(element, "value", value)  # noqa: B010  # checked above
