"""The tab Adapters: search, sort, sizes, rename, verify, export, compress, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from ...adapters.adapter import Adapter
from ...cli.commands.convert import compress
from ...core.errors import ImagicError
from ..studio import Studio
from .forms import Form
from .jobview import JobPlace, Use

_ORDERS: dict[str, Callable[[Adapter], Any]] = {
    "name": lambda adapter: adapter.name.casefold(),
    "newest first": lambda adapter: _reversed(adapter.record.created),
    "largest first": lambda adapter: -adapter.size,
}


def _reversed(text: str) -> list[int]:
    """A key that sorts texts in descending order."""
    return [-ord(letter) for letter in text]


class AdaptersTab:
    """All adapters.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio = studio
        with ui.row().classes("buttons"):
            self._search = ui.input("search", on_change=self.update).props('outlined dense clearable for="search"')
            self._order = ui.select(list(_ORDERS), value="name", label="sort", on_change=self.update).props('outlined dense for="sort"')
        self._status = ui.label().props('role="status"').classes("live")
        self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.visible = False
        self._list = ui.element("div").classes("field")
        self._job = JobPlace(studio, None, use, ended=self.update)
        self._names: list[str] = []
        self.update()
        ui.timer(2.0, self._refresh)

    def _refresh(self) -> None:
        if self._studio.store.names() != self._names:
            self.update()

    def update(self) -> None:
        """Shows the adapters that match the search."""
        wanted, self._names, found, broken = (self._search.value or "").casefold(), self._studio.store.names(), [], []
        for name in self._names:
            try:
                adapter = self._studio.store.read(name, verify=False)
            except ImagicError as error:
                broken.append((name, error))
                continue
            if wanted in f"{name} {adapter.record.prompt} {adapter.record.base.name}".casefold():
                found.append(adapter)
        self._list.clear()
        with self._list:
            total = sum(adapter.size for adapter in found) / 1e6
            ui.label(f"{len(found)} adapters, {total:.1f} MB").classes("heading")
            for adapter in sorted(found, key=_ORDERS[self._order.value]):
                self._line(adapter)
            for name, error in broken:
                ui.label(f"{name}: {error}").classes("problem")

    def _line(self, adapter: Adapter) -> None:
        record, name = adapter.record, adapter.name
        with ui.row().classes("line"):
            ui.element("img").props(f'src="/adapters/{name}/preview.png" alt="" loading="lazy"').classes("small")
            with ui.column().classes("grow"):
                ui.label(name).classes("heading")
                ui.label(
                    f"{record.prompt} · {record.base.name}, {record.config.tune.mode}, {adapter.size / 1e6:.2f} MB, {record.created[:10]}"
                )
            with ui.row().classes("buttons"):
                for label, action in (("Rename", self._rename), ("Verify", self._verify), ("Export", self._export)):
                    ui.button(label, on_click=partial(action, name)).props(f'flat dense aria-label="{label} {name}"')
                if record.config.tune.mode == "full":
                    ui.button("Compress", on_click=lambda: self._compress(name)).props(f'flat dense aria-label="Compress {name}"')
                ui.button("Delete", on_click=lambda: self._delete(name)).props(f'flat dense aria-label="Delete {name}"')

    def _ask(self, title: str, button: str, fill: Callable[[Form], Any], do: Callable[[Form], Any]) -> None:
        """Opens a question; an error stays in it, beside its field."""
        form = Form()
        with ui.dialog().props(f'aria-label="{title}"') as dialog, ui.card():
            ui.label(title).classes("heading")
            fill(form)
            form.banner()

            def done() -> None:
                try:
                    do(form)
                except ImagicError as error:
                    form.show(error)
                    return
                dialog.close()
                self.update()

            with ui.row().classes("buttons"):
                ui.button(button, on_click=done)
                ui.button("Cancel", on_click=dialog.close).props("outline")
        dialog.on("hide", dialog.delete)
        dialog.open()

    def _rename(self, name: str) -> None:
        def rename(form: Form) -> None:
            try:
                self._studio.store.rename(name, form.fields["name"].value.strip())
            except ImagicError as error:
                raise ImagicError(f"--name: {error.got}", error.expected, error.remedy) from error
            self._status.text = f"Renamed {name} to {form.fields['name'].value.strip()}"

        self._ask(f"Rename {name}", "Rename", lambda form: form.text("name", "new name", value=name), rename)

    async def _verify(self, name: str) -> None:
        self._problem.visible = False
        try:
            await asyncio.to_thread(self._studio.store.read, name)
            self._status.text = f"Verified {name}: unchanged"
        except ImagicError as error:
            self._problem.text, self._problem.visible = str(error), True

    def _export(self, name: str) -> None:
        options = {"kohya": "kohya: one file for ComfyUI and A1111", "diffusers": "diffusers: a folder"}

        def fill(form: Form) -> None:
            form.add("format", ui.select(options, value="kohya", label="format").props('outlined dense for="format"').classes("field"))

        self._ask(
            f"Export {name}", "Export", fill, lambda form: self._job.submit("export", {"name": name, "kind": form.fields["format"].value})
        )

    def _compress(self, name: str) -> None:
        def fill(form: Form) -> None:
            form.arguments(compress, "rank")
            form.fields["rank"].value = 16

        def start(form: Form) -> None:
            given = form.given_arguments()
            if "rank" not in given:
                raise ImagicError("--rank is empty", "an integer from 1", "use for example 16")
            self._job.submit("compress", {"adapter": name} | given)

        self._ask(f"Compress {name}", "Compress", fill, start)

    def _delete(self, name: str) -> None:
        def fill(form: Form) -> None:
            ui.label("This also deletes the checkpoints of an unfinished fit of this name. It cannot be undone.")

        def delete(form: Form) -> None:
            self._studio.store.remove(name)
            self._status.text = f"Deleted {name}"

        self._ask(f"Delete {name}?", "Delete", fill, delete)
