"""The tab Compare: several methods on one photo, side by side."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from ...cli.commands.compare import compare
from ...core.errors import ImagicError
from ..studio import Studio
from .drafts import Draft
from .forms import Form
from .jobview import JobPlace, Use
from .masking import MaskField
from .photos import PhotoField

_GUIDE = (
    "Drop a photo, describe the edited image, and for most methods the photo as it is.",
    "Methods fast: those that train nothing for the photo. all adds Imagic with its fit, which takes much longer.",
    "The methods run one after another, the cheapest first. What a method lacks, such as a mask, is said beside it.",
    "Their images appear here together at the end, with a page of scores, costs and settings.",
)


class CompareTab:
    """The form of a comparison.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._form, self._masks = Form(), studio.masks
        with ui.element("div").classes("columns"):
            with ui.element("div").classes("subject"):
                self._photo = PhotoField(studio.uploads, "Drop a photo here, or press to choose one", change=self._show_photo)
            with ui.element("form").props('onsubmit="return false" aria-label="New comparison"'):
                self._form.arguments(compare, "prompt", "source", "subject", "methods", "settings", "base", "budget", "seed")
                self._form.fields["methods"].value = "fast"
                self._form.fields["base"].value = studio.base or ""
                masked = ui.checkbox("Mask: what may change. Three methods need it", on_change=self._show_mask)
                self._masked = self._form.add("mask", masked)
                self._mask = MaskField(studio.uploads, self._save)
                with ui.expansion("Scores and captions by other models").classes("field"):
                    self._form.arguments(compare, "clip", "dino", "captioner", "offline")
                self._form.banner()
                ui.button("Compare", on_click=self._start)
            self._job = JobPlace(studio, "compare", use, self._form, guide=_GUIDE)
        self._show_mask()
        self._draft = Draft("compare", self._form.fields, self._more, self._restore)

    def _save(self) -> None:
        if hasattr(self, "_draft"):
            self._draft.save()

    def _more(self) -> dict[str, Any]:
        """What a draft holds besides the fields."""
        return {"photo": self._photo.stored, "name": self._photo.name, "mask": self._mask.draft}

    async def _restore(self, more: dict[str, Any]) -> None:
        """Takes back what a draft holds besides the fields."""
        if more["photo"]:
            await self._photo.show(str(more["photo"]), str(more["name"]))
            self._masked.value = any(more["mask"].values())
            self._mask.take(str(more["mask"]["painted"]), str(more["mask"]["file"]))

    def _show_photo(self) -> None:
        """Shows the photo to paint on, with the mask that was painted for a fit of it."""
        stored = self._masks.of(self._photo.sha256)
        self._masked.value = self._mask.ticked(bool(self._masked.value), stored)
        self._show_mask()
        if stored:
            self._mask.take("", stored, "The mask of this photo, from its fit")

    def _show_mask(self) -> None:
        """Shows the photo to paint on."""
        self._mask.element.visible = bool(self._masked.value and self._photo.stored)
        if self._photo.stored:
            self._mask.show(self._photo.url, self._photo.size)
        self._save()

    async def _start(self) -> None:
        """Adds the comparison to the queue."""
        self._form.clear()
        try:
            if not self._photo.stored:
                raise ImagicError("no photo", "a photo", "drop one, or press the button")
            arguments = {"image": self._photo.stored} | self._form.given_arguments()
            if "prompt" not in arguments:
                raise ImagicError("--prompt is empty", "what the edited image shows", "describe it, for example: a dog jumping")
            if self._masked.value:
                arguments["mask"] = await self._mask.stored()
                if not arguments["mask"]:
                    raise ImagicError("--mask without a mask", "a mask of what may change", "paint one, or choose a mask file")
            self._job.submit("compare", arguments)
        except ImagicError as error:
            self._form.show(error)
