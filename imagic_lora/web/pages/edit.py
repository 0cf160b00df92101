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
from ...core.settings.reading import settings_error
from ...core.text import exact
from ...photos.reading import read_metadata
from ..fields import settings_of
from ..studio import Studio
from ..uploads import holds_photo
from .choice import Choice
from .drafts import Draft
from .forms import Form
from .jobview import JobPlace, Use
from .masking import MaskField
from .photos import PhotoField, upload_button

MAX_RECALL = 64 * 2**20
_KEEP = {
    "": "nothing: every pixel is from the edit",
    "auto": "auto: what the edit did not change is from the photo",
    "mask": "mask: only what you paint is from the edit",
}


_GUIDE = (
    "Choose an adapter: its photo, and what eta did to it after the fit, are shown here.",
    "Choose eta: 0 is the photo as the model sees it, 1 the target prompt alone. Several etas show where the edit appears.",
    "Generate. The images appear here as they come; press one for its full size, its settings and the photo beside it.",
    "If other parts of the photo change too, choose keep: auto, or paint a mask of what may change.",
)


class EditTab:
    """The form of an edit.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio, self._form = studio, Form()
        self._choice = Choice(studio, self._form, self._chosen)
        with ui.element("div").classes("columns"):
            self._choice.shown()
            with ui.element("form").props('onsubmit="return false" aria-label="New edit"'):
                self._form.text("eta", "eta", "One (0.7), several (0.5,0.7), or a range with its end (0.3:1:0.1). auto searches for one")
                self._slider = ui.slider(min=0, max=1.5, step=0.05, value=0.7).props('label markers=0.5 aria-label="Eta"').classes("field")
                self._slider.on("update:model-value", self._slid)
                self._marked = ui.label().classes("hint")
                self._form.text("seed", "seed", "One (0), several (0,3), or a range without its end (0:4)", value="0")
                self._form.text("prompt", "target prompt", "Default: that of the adapter")
                with ui.expansion("Sampling").classes("field"):
                    self._form.settings(settings_of(EditConfig))
                self._form.add("keep", ui.select(_KEEP, value="", label="keep", on_change=self._show_keep))
                self._form.fields["keep"].props('outlined dense for="keep"').classes("field")
                with ui.element("div").classes("mask") as self._original:
                    ui.label("The adapter does not hold its photo at full size.").classes("hint")
                    self._photo = PhotoField(studio.uploads, "Drop that photo here, or press to choose it", change=self._show_keep)
                self._mask = MaskField(studio.uploads, self._save)
                self._form.banner()
                with ui.row().classes("buttons"):
                    ui.button("Generate", on_click=self._generate)
                ui.label("Or recall the settings of an image that was made here:").classes("hint")
                self._recalled = upload_button("Drop a PNG here, or press to choose one", "image/png", MAX_RECALL, self._recall)
            self._job = JobPlace(studio, "edit", use, self._form, guide=_GUIDE)
        self._show_keep()
        self._draft = Draft("edit", self._form.fields, self._more, self._restore)

    def _save(self) -> None:
        if hasattr(self, "_draft"):
            self._draft.save()

    def _more(self) -> dict[str, Any]:
        """What a draft holds besides the fields."""
        name = self._choice.adapter.name if self._choice.adapter else ""
        return {"adapter": name, "photo": self._photo.stored, "mask": self._mask.draft}

    async def _restore(self, more: dict[str, Any]) -> None:
        """Takes back what a draft holds besides the fields."""
        if more["adapter"] in self._studio.store.names():
            self._choice.choose(more["adapter"])
            if more["photo"]:
                await self._photo.show(str(more["photo"]), "photo")
            self._form.fields["keep"].value = "mask" if any(more["mask"].values()) else ""
            self._mask.take(str(more["mask"]["painted"]), str(more["mask"]["file"]))

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
        interpolates = record.config.method == "imagic"
        if not interpolates:
            self._form.fields["eta"].value = self._form.fields["keep"].value = ""
            self._marked.text = f"An adapter of method {record.config.method} has no eta: it makes new images of what the prompt says"
        for control in (self._slider, self._form.fields["eta"], self._form.fields["keep"]):
            control.visible = interpolates
        self._show_keep()
        self._start_with_mask(adapter)
        self._save()

    def _start_with_mask(self, adapter: Adapter) -> None:
        """Chooses the mask of the photo, which was painted for its fit; keep without a mask of this photo is nothing."""
        if adapter.record.config.method != "imagic":
            return
        stored = self._studio.masks.of(adapter.record.source.sha256) if holds_photo(adapter) else ""
        keep = self._form.fields["keep"]
        if stored:
            keep.value = "mask"
            self._show_keep()
            self._mask.take("", stored, "The mask of this photo, from its fit")
        elif keep.value == "mask" and not any(self._mask.draft.values()):
            keep.value = ""

    def _show_keep(self) -> None:
        """Shows the photo to paint on, and the upload of a photo that the adapter does not hold, where they are needed."""
        adapter, masked = self._choice.adapter, self._form.fields["keep"].value == "mask"
        missing = adapter is not None and not holds_photo(adapter)
        pasted = adapter is not None and (bool(self._form.fields["keep"].value) or adapter.record.source.region is not None)
        self._original.visible = missing and (pasted or (adapter is not None and adapter.withheld))
        self._mask.element.visible = masked and adapter is not None and (not missing or bool(self._photo.stored))
        if adapter is not None and masked:
            source = adapter.record.source
            url = self._photo.url if missing else f"/adapters/{adapter.name}/photo"
            self._mask.show(url, self._photo.size if missing else source.size, source.region)

    def _slid(self) -> None:
        self._form.fields["eta"].value = exact(round(self._slider.value or 0.0, 2))

    async def _generate(self) -> None:
        """Adds the edit to the queue."""
        self._form.clear()
        fields = self._form.fields
        eta, seed, prompt = (fields[name].value.strip() for name in ("eta", "seed", "prompt"))
        try:
            arguments: dict[str, Any] = {"name": self._choice.name()}
            if eta and eta != "auto":
                parse_etas(eta)
            parse_seeds(seed)
            keep = fields["keep"].value
            if keep == "mask" and not (keep := await self._mask.stored()):
                raise ImagicError("--keep without a mask", "a mask of what may change", "paint one, or choose a mask file")
            given = self._form.given()
            try:
                EditConfig.model_validate(given)
            except ValidationError as error:
                raise settings_error(error) from error
            optional = {"eta": eta, "prompt": prompt, "keep": keep, "settings": given}
            optional |= {"photo": self._photo.stored if self._original.visible else ""}
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
            self.use(metadata)
        except ImagicError as error:
            self._form.show(error)
        finally:
            self._recalled.reset()

    def use(self, metadata: dict[str, Any]) -> None:
        """Fills the form with the settings of an image."""
        self._draft.replace()
        try:
            config = EditConfig.model_validate(metadata["edit"])
            name, prompt, eta, seed = str(metadata["adapter"]), str(metadata["prompt"]), float(metadata["eta"]), int(metadata["seed"])
            keep = metadata.get("keep", "")
            mask = self._studio.uploads.mask_of(str(keep["mask"])) if keep and keep != "auto" else None
        except (KeyError, TypeError, ValueError, ValidationError):
            self._form.show(ImagicError("the image has no complete settings", "an image of imagic-lora edit", "choose another image"))
            return
        self._choice.choose(name)
        if self._choice.adapter is None or self._choice.adapter.name != name:
            return
        stored = self._choice.adapter.record.config.edit  # its settings are not given again: some exclude each other as flags
        self._form.set({field: value for field, value in config.model_dump().items() if value != getattr(stored, field)})
        values = {"eta": exact(eta), "seed": str(seed), "prompt": prompt, "keep": keep if keep in ("", "auto") else "mask"}
        for field, value in values.items():
            self._form.fields[field].value = value
        self._slider.value = min(1.5, eta)
        if mask:
            self._mask.take("", mask)
        elif values["keep"] == "mask":
            self._mask.clear()
            self._form.show(ImagicError("--keep: the mask of the image is not here", "its file", "paint it again, or choose its file"))
        if self._choice.adapter.content_sha256 != metadata.get("adapter_sha256"):
            self._form.show(ImagicError(f"adapter {name} is not the one that made the image", "the same adapter", "expect another image"))
