"""The field that takes a photo: upload, upright preview, and a region that the pointer draws."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nicegui import events, ui

from ...core.errors import ImagicError
from ..guard import MAX_UPLOAD
from ..uploads import Uploads


def upload_button(label: str, accept: str, most: int, received: Callable[[events.UploadEventArguments], Any]) -> ui.upload:
    """Shows a button that chooses a file and onto which one can be dropped. The uploader of Quasar, which has no labels, is hidden.

    Args:
        label: text of the button.
        accept: what the browser offers.
        most: bytes of a file.
        received: called with the upload.
    """
    upload = ui.upload(auto_upload=True, max_file_size=most, on_upload=received).props(f'accept="{accept}"')
    upload.style("display: none")
    button = ui.button(label, color=None).props("outline no-caps").classes("drop")
    button.on("click", js_handler=f"() => getElement({upload.id}).pickFiles()")
    button.on("dragover", js_handler="(event) => event.preventDefault()")
    button.on("drop", js_handler=f"(event) => {{ event.preventDefault(); getElement({upload.id}).addFiles(event.dataTransfer.files) }}")
    return upload


class PhotoField:
    """An upload with its preview.

    Args:
        uploads: where photos are stored.
        label: what to drop.
        region: whether a region may be drawn.
        change: called when there is another photo.

    Attributes:
        stored: the path of the photo for a job; empty without a photo.
        name: its name on the machine of the user, without the ending.
        region: ``X,Y,W,H`` in pixels of the upright photo; empty for all of it.
    """

    def __init__(self, uploads: Uploads, label: str, region: bool = False, change: Callable[[], Any] | None = None) -> None:
        self.stored = self.name = ""
        self._uploads, self._change = uploads, change
        self._corner: tuple[float, float] | None = None
        self._scale = 1.0
        self._upload = upload_button(label, "image/*,.heic,.tif,.tiff", MAX_UPLOAD, self._received)
        self._upload.on("rejected", lambda: self.fail(f"The file is no photo, or larger than {MAX_UPLOAD / 2**20:.0f} MB."))
        self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.visible = False
        self._image = ui.interactive_image(cross=False, on_mouse=self._mouse if region else None, events=["mousedown", "mouseup"])
        self._image.classes("preview").props('role="img"')
        self._image.visible = False
        self.region = ui.input("region").props('outlined dense stack-label placeholder="whole photo" clearable for="region"')
        self.region.props["hint"] = "Draw it in the preview, or type X,Y,W,H in pixels. Edits are pasted into the whole photo"
        self.region.classes("field").on_value_change(self._draw)
        self.region.visible = region

    def fail(self, text: str) -> None:
        """Shows why there is no photo."""
        self._problem.text, self._problem.visible = text, True

    async def _received(self, event: events.UploadEventArguments) -> None:
        """Stores an upload and shows it upright."""
        self._problem.visible = False
        try:
            data = await event.file.read()
            stored, (width, height) = await asyncio.to_thread(self._store, event.file.name, data)
        except ImagicError as error:
            self.fail(str(error))
            return
        finally:
            self._upload.reset()
        self.stored, self.name = stored, event.file.name.rpartition(".")[0]
        url = f"/uploads/{stored.rpartition('/')[2]}"
        self._scale = max(1.0, max(width, height) / 768)
        self._image.set_source(url)
        self._image.props["aria-label"] = f"The photo, {width} x {height} pixels"
        self._image.visible, self.region.value = True, ""
        if self._change:
            self._change()

    def _store(self, name: str, data: bytes) -> tuple[str, tuple[int, int]]:
        """Stores an upload, and returns its path and its size; in a thread, because decoding takes time."""
        stored = self._uploads.add(name, data)
        return stored, self._uploads.size(stored)

    def _mouse(self, event: events.MouseEventArguments) -> None:
        """Draws the region from the corner where the button went down to the one where it came up."""
        here = (event.image_x * self._scale, event.image_y * self._scale)
        if event.type == "mousedown":
            self._corner = here
        elif self._corner:
            left, right = sorted((self._corner[0], here[0]))
            top, bottom = sorted((self._corner[1], here[1]))
            self._corner = None
            if right - left >= 8 and bottom - top >= 8:
                self.region.value = f"{max(0, left):.0f},{max(0, top):.0f},{right - left:.0f},{bottom - top:.0f}"

    def _draw(self) -> None:
        """Shows the region in the preview."""
        try:
            x, y, width, height = (int(part) / self._scale for part in (self.region.value or "").split(","))
        except ValueError:
            self._image.content = ""
            return
        box = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        self._image.content = (
            f'<rect {box} fill="none" stroke="black" stroke-width="4"/><rect {box} fill="none" stroke="white" stroke-width="2"/>'
        )
