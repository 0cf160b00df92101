"""The tab Edit: the gallery of adapters, eta, seeds and sampling settings, and the grid of images that fills."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from nicegui import events, ui
from pydantic import ValidationError

from ...adapters.adapter import Adapter
from ...cli.options import parse_etas, parse_seeds
from ...core.config import EditConfig
from ...core.errors import ImagicError
from ...core.settings import settings_error
from ...core.text import exact
from ...photos.reading import read_metadata
from ..fields import settings_of
from ..studio import Studio
from .forms import Form
from .jobview import JobPlace
from .photos import upload_button

MAX_RECALL = 64 * 2**20


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
        self._studio, self._form, self._chosen = studio, form, chosen
        self._names = studio.store.names()
        self._place = ui.element("div")
        with self._place:
            self._row = gallery(studio, self.choose)
        self._label = ui.label("Choose an adapter").classes("heading").props('role="status"')
        ui.timer(2.0, self._refresh)

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


class EditTab:
    """The form of an edit.

    Args:
        studio: the studio.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio, self._form = studio, Form()
        self._choice = Choice(studio, self._form, self._chosen)
        with ui.element("div").classes("columns"):
            with ui.element("form").props('onsubmit="return false" aria-label="New edit"'):
                self._form.text("eta", "eta", "One (0.7), several (0.5,0.7), or a range with its end (0.3:1:0.1). auto searches for one")
                self._slider = ui.slider(min=0, max=1.5, step=0.05, value=0.7).props('label markers=0.5 aria-label="Eta"').classes("field")
                self._slider.on("update:model-value", self._slid)
                self._marked = ui.label().classes("hint")
                self._form.text("seed", "seed", "One (0), several (0,3), or a range without its end (0:4)", value="0")
                self._form.text("prompt", "target prompt", "Default: that of the adapter")
                with ui.expansion("Sampling").classes("field"):
                    self._form.settings(settings_of(EditConfig))
                self._form.text("keep", "keep", "auto: what the edit did not change is taken from the photo, byte for byte")
                self._form.banner()
                with ui.row().classes("buttons"):
                    ui.button("Generate", on_click=self._generate)
                ui.label("Or recall the settings of an image that was made here:").classes("hint")
                self._recalled = upload_button("Drop a PNG here, or press to choose one", "image/png", MAX_RECALL, self._recall)
            self._job = JobPlace(studio, "edit", self._use)

    def _chosen(self, adapter: Adapter) -> None:
        """Shows the defaults of an adapter."""
        record = adapter.record
        self._form.clear()
        self._form.show_defaults(record.config.edit)
        self._form.fields["eta"].props(f'stack-label placeholder="{exact(record.eta)}"')
        self._form.fields["prompt"].props["placeholder"] = record.prompt
        self._form.fields["prompt"].props("stack-label")
        self._slider.value = min(1.5, record.eta)
        source = "suggested by a sweep" if record.suggested else "of the fit"
        self._marked.text = f"Eta {exact(record.eta)} is {source}: lower keeps more of the photo, higher follows the prompt"

    def _slid(self) -> None:
        self._form.fields["eta"].value = exact(round(self._slider.value or 0.0, 2))

    def _generate(self) -> None:
        """Adds the edit to the queue."""
        self._form.clear()
        fields = self._form.fields
        eta, seed, prompt, keep = (fields[name].value.strip() for name in ("eta", "seed", "prompt", "keep"))
        try:
            arguments: dict[str, Any] = {"name": self._choice.name()}
            if eta and eta != "auto":
                parse_etas(eta)
            parse_seeds(seed)
            if keep not in ("", "auto"):
                raise ImagicError(f"--keep {keep}", "auto, or nothing", "for a mask of your own use imagic-lora edit --keep MASK.png")
            given = self._form.given()
            try:
                EditConfig.model_validate(given)
            except ValidationError as error:
                raise settings_error(error) from error
            optional = {"eta": eta, "prompt": prompt, "keep": keep, "settings": given}
            arguments |= {"seed": seed} | {name: value for name, value in optional.items() if value}
            self._job.submit("edit", arguments)
        except ImagicError as error:
            self._form.show(error)

    async def _recall(self, event: events.UploadEventArguments) -> None:
        """Takes the settings from a PNG."""
        try:
            data = await event.file.read()
            if len(data) > MAX_RECALL:
                raise ImagicError(f"a file of {len(data):,} bytes", f"at most {MAX_RECALL:,}", "choose an image that was made here")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "image.png"
                path.write_bytes(data)
                metadata = await asyncio.to_thread(read_metadata, path)
            self._use(metadata)
        except ImagicError as error:
            self._form.show(error)
        finally:
            self._recalled.reset()

    def _use(self, metadata: dict[str, Any]) -> None:
        """Fills the form with the settings of an image."""
        try:
            config = EditConfig.model_validate(metadata["edit"])
            name, prompt, eta, seed = str(metadata["adapter"]), str(metadata["prompt"]), float(metadata["eta"]), int(metadata["seed"])
        except (KeyError, TypeError, ValueError, ValidationError):
            self._form.show(ImagicError("the image has no complete settings", "an image of imagic-lora edit", "choose another image"))
            return
        self._choice.choose(name)
        if self._choice.adapter is None or self._choice.adapter.name != name:
            return
        self._form.set(config.model_dump())
        values = {"eta": exact(eta), "seed": str(seed), "prompt": prompt, "keep": "auto" if metadata.get("keep") == "auto" else ""}
        for field, value in values.items():
            self._form.fields[field].value = value
        self._slider.value = min(1.5, eta)
        if self._choice.adapter.content_sha256 != metadata.get("adapter_sha256"):
            self._form.show(ImagicError(f"adapter {name} is not the one that made the image", "the same adapter", "expect another image"))
