"""The tab Sweep: what eta does to an adapter, and the eta that is suggested."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from ...adapters.adapter import Adapter
from ...cli.options import parse_etas
from ...core.config import EditConfig
from ...core.errors import ImagicError
from ..fields import settings_of
from ..studio import Studio
from .edit import Choice
from .forms import Form
from .jobview import JobPlace


class SweepTab:
    """The form of a sweep.

    Args:
        studio: the studio.
    """

    def __init__(self, studio: Studio) -> None:
        self._form = Form()
        self._choice = Choice(studio, self._form, self._chosen)
        with ui.element("div").classes("columns"):
            with ui.element("form").props('onsubmit="return false" aria-label="New sweep"'):
                hint = "Several (0,0.5,0.7), or a range with its end. 0 is always added: the scores compare with it"
                self._form.text("eta", "eta", hint, value="0:1.2:0.1")
                self._form.text("seeds", "number of seeds", "Default: 4, or 1 where the seed has no effect")
                self._form.text("prompt", "target prompt", "Default: that of the adapter")
                with ui.expansion("Sampling").classes("field"):
                    self._form.settings(settings_of(EditConfig))
                self._stored = ui.checkbox("Store the suggested eta in the adapter: the default of later edits")
                self._form.banner()
                ui.button("Start the sweep", on_click=self._start)
            self._job = JobPlace(studio, "sweep")

    def _chosen(self, adapter: Adapter) -> None:
        self._form.show_defaults(adapter.record.config.edit)

    def _start(self) -> None:
        """Adds the sweep to the queue."""
        self._form.clear()
        eta, seeds, prompt = (self._form.fields[name].value.strip() for name in ("eta", "seeds", "prompt"))
        try:
            parse_etas(eta)
            if seeds and not (seeds.isascii() and seeds.isdigit()):
                raise ImagicError(f"--seeds {seeds}", "an integer from 1", "choose another number of seeds")
            optional: dict[str, Any] = {"prompt": prompt, "seeds": int(seeds or 0), "settings": self._form.given()}
            arguments = {"name": self._choice.name(), "eta": eta, "store_eta": self._stored.value}
            self._job.submit("sweep", arguments | {name: value for name, value in optional.items() if value})
        except ImagicError as error:
            self._form.show(error)
