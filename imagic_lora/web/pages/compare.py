"""The tab Compare: several methods on one photo, side by side."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from ...core.errors import ImagicError
from ..studio import Studio
from .forms import Form
from .jobview import JobPlace
from .photos import PhotoField


class CompareTab:
    """The form of a comparison.

    Args:
        studio: the studio.
    """

    def __init__(self, studio: Studio) -> None:
        self._form = Form()
        with ui.element("div").classes("columns"):
            with ui.element("form").props('onsubmit="return false" aria-label="New comparison"'):
                self._photo = PhotoField(studio.uploads, "Drop a photo here, or press to choose one")
                self._form.text("prompt", "target prompt", "Describes the edited image")
                self._form.text("source", "source prompt", "Describes the photo as it is. Many methods need one")
                self._form.text("methods", "methods", "Names separated by commas, all, or fast: those that train nothing", value="fast")
                self._form.text("base", "base", "Base model, as for a fit", value=studio.base or "")
                self._form.text("budget", "budget", "Seconds that the methods may take together. Default: no limit")
                self._form.text("seed", "seed", "Seed of every random number", value="0")
                self._form.banner()
                ui.button("Compare", on_click=self._start)
            self._job = JobPlace(studio, "compare")

    def _start(self) -> None:
        """Adds the comparison to the queue."""
        self._form.clear()
        names = ("prompt", "source", "methods", "base", "budget", "seed")
        prompt, source, methods, base, budget, seed = (self._form.fields[name].value.strip() for name in names)
        try:
            if not self._photo.stored:
                raise ImagicError("no photo", "a photo", "drop one, or press the button")
            if not prompt:
                raise ImagicError("--prompt is empty", "what the edited image shows", "describe it, for example: a dog jumping")
            if not (seed.isascii() and seed.isdigit()):
                raise ImagicError(f"--seed {seed}", "an integer from 0", "choose another seed")
            optional: dict[str, Any] = {"source": source, "base": base, "budget": _seconds(budget)}
            arguments = {"image": self._photo.stored, "prompt": prompt, "methods": methods, "seed": int(seed)}
            self._job.submit("compare", arguments | {name: value for name, value in optional.items() if value})
        except ImagicError as error:
            self._form.show(error)


def _seconds(text: str) -> float | None:
    """The number of seconds in a field."""
    try:
        return float(text) if text else None
    except ValueError:
        raise ImagicError(f"--budget {text}", "a number of seconds above 0", "choose another budget, or leave it out") from None
