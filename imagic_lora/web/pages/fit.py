"""The tab Fit: photo, prompt, base, preset, mode, the memory plan before the start, and the fit while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from nicegui import ui

from ...adapters.store import check_name
from ...core.config import FitMethod, RunConfig
from ...core.errors import ImagicError
from ...core.settings.unread import read_instead
from ...core.text import slug
from ...photos.region import parse_region
from ..fields import Setting, settings_of
from ..planning import defaults, planned
from ..studio import Studio
from .drafts import Draft
from .forms import Form
from .jobview import JobPlace, Use
from .masking import MaskField
from .photos import PhotoField, PhotosField

_WATCH = "Watch the losses and the previews here. Stop saves a checkpoint to resume from; closing the page changes nothing."
_GUIDES: dict[FitMethod, Sequence[str]] = {
    "imagic": (
        "Drop a photo. To fit a part of it only, draw a rectangle on it. A mask says what later edits may change.",
        "Type the target prompt: one sentence that describes the edited image, not the change.",
        "Start. Stage embed looks for the embedding of the prompt that explains the photo; stage tune trains the model on it.",
        _WATCH,
        "Then open Edit: between the two embeddings lies the edit.",
    ),
    "dreambooth": (
        "Drop one photo of the subject, or several.",
        "Type the prompt: a rare word before the noun names the subject, as in a photo of sks dog.",
        "Start. Pictures of others of its class are made first; then the model is trained on both, so that the noun keeps its meaning.",
        _WATCH,
        "Then open Edit, and use the rare word and the noun in another prompt: pose and place follow it.",
    ),
    "textual-inversion": (
        "Drop one photo of the subject, or several.",
        "Type the prompt: the new word in angle brackets names the subject, as in a photo of <my-dog>.",
        "Start. The vectors of the new word are trained; no weight of the model changes.",
        _WATCH,
        "Then open Edit, and use the new word in another prompt: pose and place follow it.",
    ),
}
_FIRST = ("method", "base", "preset", "tune.mode")
_OWN = ("dreambooth", "inversion")  # groups of settings that belong to one method, which its fit needs
_PROMPTS: dict[FitMethod, str] = {
    "imagic": "Describes the edited image, for example: a dog jumping",
    "dreambooth": "Describes the photos, with a rare word before the noun, for example: a photo of sks dog",
    "textual-inversion": "Describes the photos, with the new word in angle brackets, for example: a photo of <my-dog>",
}
_PATIENCE = 0.6  # seconds without a change before the plan is made


class FitTab:
    """The form of a fit.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio, self._form, self._changes = studio, Form(), 0
        self._groups: dict[str, tuple[ui.element, list[str]]] = {}
        with ui.element("div").classes("columns"):
            with ui.element("div").classes("subject"):
                self._photo = PhotoField(studio.uploads, "Drop a photo here, or press to choose one", region=True, change=self._named)
                self._photo.region.on_value_change(self._show_mask)
                self._photos = PhotosField(studio.uploads, self._named)
            with ui.element("form").props('onsubmit="return false" aria-label="New fit"'):
                self._fields()
                self._form.banner()
                self._plan = ui.element("div").classes("plan").props('role="status" aria-label="Memory plan"')
                ui.button("Start", on_click=self._start)
            self._job = JobPlace(studio, "fit", use, self._form)
        self._show_method()
        self._draft = Draft("fit", self._form.fields, self._more, self._restore)
        ui.timer(0.1, self._changed, once=True)

    def _fields(self) -> None:
        """Places the fields of the form: first what every fit needs, then what its method needs, then all other settings."""
        every = settings_of(RunConfig)
        self._form.add("image", self._photo, "--image")
        self._form.add("region", self._photo.region)
        self._form.text("prompt", "target prompt", _PROMPTS["imagic"])
        self._form.text("name", "name", "Of the adapter. Default: the file name of the photo")
        self._form.settings([one for one in every if one.path in _FIRST], self._changed)
        self._form.fields["method"].on_value_change(self._show_method)
        if self._studio.base:
            self._form.fields["base"].value = self._studio.base
        for group in _OWN:
            self._group(group, [one for one in every if one.path.startswith(f"{group}.")])
        self._masked = self._form.add("mask", ui.checkbox("Mask: what edits may change. The rest stays the photo"))
        self._masked.on_value_change(self._show_mask)
        self._mask = MaskField(self._studio.uploads, self._save)
        with ui.expansion("All settings").classes("field"):
            for group in dict.fromkeys(one.path.rpartition(".")[0] for one in every):
                members = [one for one in every if one.path.rpartition(".")[0] == group and one.path not in _FIRST]
                if group not in _OWN:
                    self._group(group, members)
        kept = ui.checkbox("Keep a copy of the photo in the adapter, with its metadata", value=True)
        self._photo_kept = self._form.add("store_photo", kept)
        self._overwrite = self._form.add("overwrite", ui.checkbox("Replace an adapter or an unfinished fit of this name"))

    def _group(self, group: str, members: list[Setting]) -> None:
        """Places the settings of a group."""
        with ui.element("fieldset") as place:
            with ui.element("legend"):
                ui.label(group or "run")
            self._form.settings(members, self._changed)
        self._groups[group] = place, [one.path for one in members]

    @property
    def _method(self) -> FitMethod:
        return self._form.fields["method"].value or RunConfig().method

    def _show_method(self) -> None:
        """Shows what the method of the fit takes: one photo or several, the mask, its settings."""
        method, edits = self._method, self._method == "imagic"
        shown = self._form.offer(lambda path: read_instead(method, path) is None)
        for place, paths in self._groups.values():
            place.visible = not shown.isdisjoint(paths)
        self._form.fields["prompt"].props["hint"] = _PROMPTS[method]
        self._job.guide(_GUIDES[method])
        if not edits and self._photo.stored and not self._photos.stored:
            self._photos.take([self._photo.stored], self._photo.name)
        self._photo.element.visible = self._photo_kept.visible = self._masked.visible = edits
        self._photos.element.visible = not edits
        self._show_mask()

    def _show_mask(self) -> None:
        """Shows the photo to paint on."""
        self._mask.element.visible = bool(self._masked.value and self._photo.stored and self._method == "imagic")
        if self._photo.stored:
            try:
                region = parse_region(self._photo.region.value) if self._photo.region.value else None
            except ImagicError:
                region = None  # the start says what is wrong
            self._mask.show(self._photo.url, self._photo.size, region)
        self._save()

    def _save(self) -> None:
        if hasattr(self, "_draft"):
            self._draft.save()

    @property
    def _photo_name(self) -> str:
        """The name of the adapter, from the file of the photo."""
        return slug(self._photo.name if self._method == "imagic" else self._photos.name, "photo")

    def _named(self) -> None:
        """Shows the name of a new photo, and the mask of an earlier fit of it."""
        self._form.fields["name"].props(f'stack-label placeholder="{self._photo_name}"')
        if self._method == "imagic":
            stored = self._studio.masks.of(self._photo.sha256)
            self._masked.value = self._mask.ticked(bool(self._masked.value), stored)
            self._show_mask()
            if stored:
                self._mask.take("", stored, "The mask of this photo, from an earlier fit")
        self._save()

    def _more(self) -> dict[str, Any]:
        """What a draft holds besides the fields."""
        several = {"photos": self._photos.stored, "first": self._photos.name}
        return {"photo": self._photo.stored, "name": self._photo.name, "mask": self._mask.draft} | several

    async def _restore(self, more: dict[str, Any]) -> None:
        """Takes back what a draft holds besides the fields."""
        if more["photo"]:
            await self._photo.show(str(more["photo"]), str(more["name"]))
            self._masked.value = any(more["mask"].values())
            self._mask.take(str(more["mask"]["painted"]), str(more["mask"]["file"]))
        self._photos.take([str(photo) for photo in more["photos"]], str(more["first"]))

    async def _changed(self) -> None:
        """Makes the plan anew when nothing has changed for a moment."""
        self._form.clear()  # now, not with the plan: a start may say what is wrong meanwhile
        self._changes += 1
        mine = self._changes
        await asyncio.sleep(_PATIENCE)
        if mine != self._changes:
            return
        try:
            given = self._form.given()
            shown = await asyncio.to_thread(defaults, given)
            self._form.show_defaults(shown, but=("memory", "preset", "base"))
            self._show_plans(None)
            cards = self._studio.supervisor.models
            plans = await asyncio.gather(*(planned(given, place.environment) for place in cards.values()))
        except ImagicError as error:
            if mine == self._changes:
                self._form.show(error)
                self._plan.clear()
            return
        if mine == self._changes:
            self._show_plans(dict(zip(cards, plans, strict=True)))

    def _show_plans(self, plans: dict[str, dict[str, Any]] | None) -> None:
        """Shows the predicted memory on each model of card: a fit runs on the card that is free first."""
        self._plan.clear()
        with self._plan:
            if plans is None:
                ui.label("Predicting the memory ...")
                return
            for card, plan in plans.items():
                _show_plan(plan, f" on {card}" if len(plans) > 1 else "")

    async def _start(self) -> None:
        """Checks what can be checked without the base, and adds the fit to the queue."""
        self._form.clear()
        region = (self._photo.region.value or "") if self._method == "imagic" else ""
        prompt = self._form.fields["prompt"].value.strip()
        name, overwrite = self._form.fields["name"].value.strip() or self._photo_name, bool(self._overwrite.value)
        photos = [self._photo.stored] if self._method == "imagic" else self._photos.stored
        try:
            if not any(photos):
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
            image = await asyncio.to_thread(self._studio.uploads.together, photos)
            arguments = {"image": image, "prompt": prompt, "name": name, "settings": self._form.given(), "overwrite": overwrite}
            if self._method == "imagic":
                arguments |= {"store_photo": self._photo_kept.value} | ({"region": region} if region else {})
                await self._keep_mask()
            self._job.submit("fit", arguments)
        except ImagicError as error:
            named = error.got if error.got.startswith("--") or "--name" not in error.remedy else f"--name: {error.got}"
            self._form.show(ImagicError(named, error.expected, error.remedy))

    async def _keep_mask(self) -> None:
        """Keeps the mask for later edits of the photo; a photo without one loses that of an earlier fit."""
        stored = await self._mask.stored() if self._masked.value else ""
        if self._masked.value and not stored:
            raise ImagicError("--mask without a mask", "a mask of what edits may change", "paint one, choose a mask file, or untick it")
        self._studio.masks.set(self._photo.sha256, stored)


def _show_plan(plan: dict[str, Any], where: str) -> None:
    """Shows the predicted memory by stage, and whether the card has it."""
    peak, worst = plan["peak_bytes"] / 2**30, plan["worst_stage"]
    ui.label(f"Predicted peak{where}: {peak:.2f} GiB in stage {worst}, preset {plan['preset']}").classes("heading")
    for name, stage in plan["stages"].items():
        with ui.row().classes("bar"):
            ui.label(name)
            ui.linear_progress(stage["peak_bytes"] / plan["peak_bytes"], show_value=False).props(f'aria-label="Memory of {name}{where}"')
            ui.label(f"{stage['peak_bytes'] / 2**30:.2f} GiB")
    if not plan["fits"]:
        cpu = plan["assumed"]["device"] == "cpu"
        more = "is free on this machine" if cpu else f"the card of preset {plan['preset']} has"
        other = "" if cpu else "a preset for a smaller card, "
        ui.label(f"This is more than {more}. Choose {other}mode lora instead of full, or a lower resolution.").classes("problem")
