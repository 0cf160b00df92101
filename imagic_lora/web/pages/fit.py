"""The tab Fit: photo, prompt, base, preset, mode, the memory plan before the start, and the fit while it runs."""

from __future__ import annotations

import asyncio
from typing import Any

from nicegui import ui

from ...adapters.store import check_name
from ...core.config import RunConfig
from ...core.errors import ImagicError
from ...core.text import slug
from ...photos.region import parse_region
from ..fields import settings_of
from ..planning import defaults, planned
from ..studio import Studio
from .drafts import Draft
from .forms import Form
from .jobview import JobPlace, Use
from .photos import PhotoField

_GUIDE = (
    "Drop a photo. To fit a part of it only, draw a rectangle on it.",
    "Type the target prompt: one sentence that describes the edited image, not the change.",
    "Start. Stage embed looks for the embedding of the prompt that explains the photo; stage tune trains the model on the photo with it.",
    "Watch the losses and the previews here. Stop saves a checkpoint to resume from; closing the page changes nothing.",
    "Then open Edit: between the two embeddings lies the edit.",
)
_FIRST = ("base", "preset", "tune.mode")
_PATIENCE = 0.6  # seconds without a change before the plan is made


class FitTab:
    """The form of a fit.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio, self._form, self._changes = studio, Form(), 0
        every = settings_of(RunConfig)
        with ui.element("div").classes("columns"):
            with ui.element("div").classes("subject"):
                self._photo = PhotoField(studio.uploads, "Drop a photo here, or press to choose one", region=True, change=self._named)
            with ui.element("form").props('onsubmit="return false" aria-label="New fit"'):
                self._form.add("image", self._photo, "--image")
                self._form.add("region", self._photo.region)
                self._form.text("prompt", "target prompt", "Describes the edited image, for example: a dog jumping")
                self._form.text("name", "name", "Of the adapter. Default: the file name of the photo")
                self._form.settings([one for one in every if one.path in _FIRST], self._changed)
                if studio.base:
                    self._form.fields["base"].value = studio.base
                with ui.expansion("All settings").classes("field"):
                    for group in dict.fromkeys(one.path.rpartition(".")[0] for one in every):
                        members = [one for one in every if one.path.rpartition(".")[0] == group and one.path not in _FIRST]
                        with ui.element("fieldset"):
                            with ui.element("legend"):
                                ui.label(group or "run")
                            self._form.settings(members, self._changed)
                kept = ui.checkbox("Keep a copy of the photo in the adapter, with its metadata", value=True)
                self._photo_kept = self._form.add("store_photo", kept)
                self._overwrite = self._form.add("overwrite", ui.checkbox("Replace an adapter or an unfinished fit of this name"))
                self._form.banner()
                self._plan = ui.element("div").classes("plan").props('role="status" aria-label="Memory plan"')
                ui.button("Start", on_click=self._start)
            self._job = JobPlace(studio, "fit", use, self._form, guide=_GUIDE)
        self._draft = Draft("fit", self._form.fields, self._more, self._restore)
        ui.timer(0.1, self._changed, once=True)

    def _named(self) -> None:
        self._form.fields["name"].props(f'stack-label placeholder="{slug(self._photo.name, "photo")}"')
        self._draft.save()

    def _more(self) -> dict[str, Any]:
        """What a draft holds besides the fields."""
        return {"photo": self._photo.stored, "name": self._photo.name}

    async def _restore(self, more: dict[str, Any]) -> None:
        """Takes back what a draft holds besides the fields."""
        if more["photo"]:
            await self._photo.show(str(more["photo"]), str(more["name"]))

    async def _changed(self) -> None:
        """Makes the plan anew when nothing has changed for a moment."""
        self._changes += 1
        mine = self._changes
        await asyncio.sleep(_PATIENCE)
        if mine != self._changes:
            return
        given = self._form.given()
        try:
            shown = await asyncio.to_thread(defaults, given)
            self._form.clear()
            self._form.show_defaults(shown, but=("memory", "preset", "base"))
            self._show_plan(None)
            plan = await planned(given)
        except ImagicError as error:
            if mine == self._changes:
                self._form.show(error)
                self._plan.clear()
            return
        if mine == self._changes:
            self._show_plan(plan)

    def _show_plan(self, plan: dict[str, Any] | None) -> None:
        """Shows the predicted memory by stage, and whether the card has it."""
        self._plan.clear()
        with self._plan:
            if plan is None:
                ui.label("Predicting the memory ...")
                return
            peak, worst = plan["peak_bytes"] / 2**30, plan["worst_stage"]
            ui.label(f"Predicted peak: {peak:.2f} GiB in stage {worst}, preset {plan['preset']}").classes("heading")
            for name, stage in plan["stages"].items():
                with ui.row().classes("bar"):
                    ui.label(name)
                    ui.linear_progress(stage["peak_bytes"] / plan["peak_bytes"], show_value=False).props(f'aria-label="Memory of {name}"')
                    ui.label(f"{stage['peak_bytes'] / 2**30:.2f} GiB")
            if not plan["fits"]:
                ui.label(
                    f"This is more than the card of preset {plan['preset']} has. Choose a preset for a smaller card, "
                    "mode lora instead of full, or a lower resolution."
                ).classes("problem")

    async def _start(self) -> None:
        """Checks what can be checked without the base, and adds the fit to the queue."""
        self._form.clear()
        given, region = self._form.given(), self._photo.region.value or ""
        prompt = self._form.fields["prompt"].value.strip()
        name = self._form.fields["name"].value.strip() or slug(self._photo.name, "photo")
        overwrite = bool(self._overwrite.value)
        try:
            if not self._photo.stored:
                raise ImagicError("no photo", "a photo", "drop one, or press the button")
            if not prompt:
                raise ImagicError("--prompt is empty", "what the edited image shows", "describe it, for example: a dog jumping")
            if region:
                parse_region(region)
            check_name(name)
            await asyncio.to_thread(self._studio.store.check_free, name, overwrite)
            if name in self._studio.store.unfinished() and not overwrite:
                got = f"--name {name}: an unfinished fit has it"
                raise ImagicError(got, "an unused name", "resume that fit in the queue, or let it be replaced")
            arguments = {"image": self._photo.stored, "prompt": prompt, "name": name, "settings": given, "overwrite": overwrite}
            arguments |= {"store_photo": self._photo_kept.value} | ({"region": region} if region else {})
            self._job.submit("fit", arguments)
        except ImagicError as error:
            named = error.got if error.got.startswith("--") or "--name" not in error.remedy else f"--name: {error.got}"
            self._form.show(ImagicError(named, error.expected, error.remedy))
