"""The tab Sweep: what eta does to an adapter, and the eta that is suggested."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from ...adapters.adapter import Adapter
from ...cli.commands.sweep import sweep
from ...cli.options import parse_etas
from ...core.config import EditConfig
from ...core.errors import ImagicError
from ..fields import settings_of
from ..studio import Studio
from ..uploads import holds_photo
from .choice import Choice
from .drafts import Draft
from .forms import Form
from .jobview import JobPlace, Use
from .photos import PhotoField

_GUIDE = (
    "Choose an adapter. An image is generated for every eta and every seed.",
    "Each is scored by the base itself: alignment with the target prompt, fidelity to the reconstruction of the photo.",
    "The plot and the images appear here, with an eta where both are good. Press a point or an image to open it.",
)


class SweepTab:
    """The form of a sweep.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio, self._form = studio, Form()
        self._choice = Choice(studio, self._form, self._chosen)
        with ui.element("div").classes("columns"):
            self._choice.shown()
            with ui.element("form").props('onsubmit="return false" aria-label="New sweep"'):
                hint = "Several (0,0.5,0.7), or a range with its end. 0 is always added: the scores compare with it"
                self._form.text("eta", "eta", hint, value="0:1.2:0.1")
                self._form.arguments(sweep, "seeds", "prompt")
                with ui.expansion("Sampling").classes("field"):
                    self._form.settings(settings_of(EditConfig))
                stored = ui.checkbox("Store the suggested eta in the adapter: the default of later edits")
                self._form.add("store_eta", stored)
                with ui.expansion("Scores by other models").classes("field"):
                    self._form.arguments(sweep, "clip", "dino", "source_prompt", "offline")
                with ui.element("div").classes("mask") as self._original:
                    ui.label("The adapter is of a region, and does not hold its photo.").classes("hint")
                    self._photo = PhotoField(studio.uploads, "Drop that photo here, or press to choose it")
                self._form.banner()
                ui.button("Start the sweep", on_click=self._start)
            self._job = JobPlace(studio, "sweep", use, self._form, guide=_GUIDE)
        self._original.visible = False
        self._draft = Draft("sweep", self._form.fields, self._more, self._restore)

    def _more(self) -> dict[str, Any]:
        """What a draft holds besides the fields."""
        return {"adapter": self._choice.adapter.name if self._choice.adapter else ""}

    async def _restore(self, more: dict[str, Any]) -> None:
        """Takes back what a draft holds besides the fields."""
        if more["adapter"] in self._studio.store.names():
            self._choice.choose(more["adapter"])

    def _chosen(self, adapter: Adapter) -> None:
        self._form.show_defaults(adapter.record.config.edit)
        self._original.visible = adapter.record.source.region is not None and not holds_photo(adapter)
        self._draft.save()

    def _start(self) -> None:
        """Adds the sweep to the queue."""
        self._form.clear()
        eta = self._form.fields["eta"].value.strip()
        try:
            parse_etas(eta)
            arguments = {"name": self._choice.name(), "eta": eta, "store_eta": self._form.fields["store_eta"].value}
            optional = {"settings": self._form.given(), "photo": self._photo.stored if self._original.visible else ""}
            arguments |= self._form.given_arguments() | {name: value for name, value in optional.items() if value}
            self._job.submit("sweep", arguments)
        except ImagicError as error:
            self._form.show(error)
