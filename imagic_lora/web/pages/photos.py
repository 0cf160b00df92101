"""The fields that take a photo: upload, upright preview, a region that the pointer draws, a mask that it paints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nicegui import events, ui

from ...core.errors import ImagicError
from ..guard import MAX_UPLOAD
from ..uploads import Uploads

_BRUSH = 0.08  # of the longer side


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


class Drawing(ui.element, component="drawing.js"):
    """The preview of a photo, on which the pointer draws a rectangle or paints a mask.

    Args:
        brush: diameter of the brush, as a share of the longer side; 0 draws a rectangle.
        drawn: called with the rectangle: left, top, width and height, as shares of the photo.
        painted: called after each stroke with the mask, a PNG as a ``data:`` URL; empty if nothing is painted.
    """

    def __init__(
        self, brush: float = 0.0, drawn: Callable[[list[float]], Any] | None = None, painted: Callable[[str], Any] | None = None
    ) -> None:
        super().__init__()
        self.classes("preview")
        self._props |= {"brush": brush, "erase": False, "mask": "", "box": None}
        if drawn:
            self.on("drawn", lambda event: drawn([float(share) for share in event.args]))
        if painted:
            self.on("painted", lambda event: painted(str(event.args)))
        self.visible = False

    def show(self, url: str, size: tuple[int, int]) -> None:
        """Shows a photo.

        Args:
            url: the address of its preview.
            size: its width and height in pixels.
        """
        self._props |= {"src": url, "label": f"The photo, {size[0]} x {size[1]} pixels"}
        self.visible = True
        self.update()

    def set(self, **values: Any) -> None:
        """Changes ``brush``, ``erase``, ``mask`` (an address) or ``box`` (shares of the photo)."""
        self._props |= values
        self.update()


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
        size: its width and height in pixels.
        region: ``X,Y,W,H`` in pixels of the upright photo; empty for all of it.
    """

    def __init__(self, uploads: Uploads, label: str, region: bool = False, change: Callable[[], Any] | None = None) -> None:
        self.stored = self.name = ""
        self.size = (0, 0)
        self._uploads, self._change = uploads, change
        self._upload = upload_button(label, "image/*,.heic,.tif,.tiff", MAX_UPLOAD, self._received)
        self._upload.on("rejected", lambda: self.fail(f"The file is no photo, or larger than {MAX_UPLOAD / 2**20:.0f} MB."))
        self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.visible = False
        self._drawing = Drawing(drawn=self._drawn if region else lambda box: None)
        self.region = ui.input("region").props('outlined dense stack-label placeholder="whole photo" clearable for="region"')
        self.region.props["hint"] = "Draw it in the preview, or type X,Y,W,H in pixels. Edits are pasted into the whole photo"
        self.region.classes("field").on_value_change(self._show_region)
        self.region.visible = region

    @property
    def url(self) -> str:
        """The address of the preview."""
        return f"/uploads/{self.stored.rpartition('/')[2]}"

    def fail(self, text: str) -> None:
        """Shows why there is no photo."""
        self._problem.text, self._problem.visible = text, True

    async def _received(self, event: events.UploadEventArguments) -> None:
        """Stores an upload and shows it upright."""
        self._problem.visible = False
        try:
            data = await event.file.read()
            stored = await asyncio.to_thread(self._uploads.add, event.file.name, data)
        except ImagicError as error:
            self.fail(str(error))
            return
        finally:
            self._upload.reset()
        self.region.value = ""
        await self.show(stored, event.file.name.rpartition(".")[0])

    async def show(self, stored: str, name: str) -> None:
        """Shows a photo that is stored.

        Args:
            stored: its path.
            name: its name on the machine of the user, without the ending.

        Raises:
            ImagicError: there is no such upload.
        """
        self.size = await asyncio.to_thread(self._uploads.size, stored)
        self.stored, self.name = stored, name
        self._drawing.show(self.url, self.size)
        self._show_region()
        if self._change:
            self._change()

    def _drawn(self, box: list[float]) -> None:
        """Takes the rectangle as the region; a press that draws none changes nothing."""
        x, y, width, height = (round(share * side) for share, side in zip(box, self.size * 2, strict=True))
        if width >= 8 and height >= 8:
            self.region.value = f"{x},{y},{width},{height}"
        self._show_region()

    def _show_region(self) -> None:
        """Shows the region in the preview."""
        try:
            x, y, width, height = (int(part) for part in (self.region.value or "").split(","))
        except ValueError:
            self._drawing.set(box=None)
            return
        if self.stored:
            self._drawing.set(box=[x / self.size[0], y / self.size[1], width / self.size[0], height / self.size[1]])


class MaskField:
    """A mask of what may change: painted on the photo, or a file.

    Args:
        uploads: where masks are stored.
        change: called when there is another mask.

    Attributes:
        painted: the painted mask as a ``data:`` URL; empty without one.
        file: the path of a mask that was uploaded; empty without one.
    """

    def __init__(self, uploads: Uploads, change: Callable[[], Any] = int) -> None:
        self.painted = self.file = ""
        self._uploads, self._change = uploads, change
        self._url, self._size = "", (0, 0)
        with ui.element("div").classes("mask").props('role="group" aria-label="Mask"') as self.element:
            self._drawing = Drawing(_BRUSH, painted=self._painted)
            with ui.row().classes("buttons"):
                tool = ui.toggle({False: "Paint", True: "Erase"}, value=False).props('no-caps dense aria-label="Tool"')
                tool.on_value_change(lambda: self._drawing.set(erase=bool(tool.value)))
                ui.button("Clear", on_click=self.clear).props("flat dense")
            with ui.row().classes("brush"):
                ui.label("Brush")
                size = ui.slider(min=0.01, max=0.3, step=0.01, value=_BRUSH).props('aria-label="Size of the brush"')
                size.on_value_change(lambda: self._drawing.set(brush=size.value or _BRUSH))
            self._upload = upload_button("Or use a mask file: press, or drop it here", "image/*", MAX_UPLOAD, self._received)
            self._status = ui.label().props('role="status"').classes("hint")
            self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.visible = False
        self.clear()

    def show(self, url: str, size: tuple[int, int], region: tuple[int, int, int, int] | None = None) -> None:
        """Shows the photo to paint on; the mask of another photo is cleared.

        Args:
            url: the address of its preview.
            size: its width and height in pixels.
            region: the part of it that can change at all: left, top, width and height; None is all of it.
        """
        if (url, size) != (self._url, self._size):
            self.clear()
        self._url, self._size = url, size
        sides = size * 2
        self._drawing.set(box=[part / side for part, side in zip(region, sides, strict=True)] if region else None)
        self._drawing.show(url, size)

    def clear(self) -> None:
        """Removes the mask."""
        self._take("", "")
        self._drawing.set(mask="")

    def take(self, painted: str, file: str) -> None:
        """Shows a mask that was painted, or one that is stored.

        Raises:
            ImagicError: there is no such upload.
        """
        if file:
            self._uploads.path(file)
        self._take(painted, file)
        self._drawing.set(mask=painted or (f"/uploads/{file.rpartition('/')[2]}" if file else ""))

    async def stored(self) -> str:
        """Returns the path of the mask for a job; empty without one.

        Raises:
            ImagicError: as :meth:`~imagic_lora.web.uploads.Uploads.add_painted`.
        """
        return await asyncio.to_thread(self._uploads.add_painted, self.painted, self._size) if self.painted else self.file

    def _painted(self, url: str) -> None:
        self._take(url, "")
        self._drawing.props["mask"] = url

    def _take(self, painted: str, file: str) -> None:
        self.painted, self.file = painted, file
        self._problem.visible = False
        self._status.text = "Painted: what is coloured may change" if painted else "From a file" if file else "Paint what may change"
        self._change()

    async def _received(self, event: events.UploadEventArguments) -> None:
        """Stores a mask file and shows it."""
        try:
            data = await event.file.read()
            file = await asyncio.to_thread(self._uploads.add_mask, event.file.name, data, self._size)
            self.take("", file)
        except ImagicError as error:
            self._problem.text, self._problem.visible = str(error), True
        finally:
            self._upload.reset()
