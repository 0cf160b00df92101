"""The fields that take photos: upload, upright preview, a region that the pointer draws."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nicegui import events, ui

from ...core.errors import ImagicError
from ..guard import MAX_UPLOAD
from ..uploads import Uploads

_PHOTOS = "image/*,.heic,.tif,.tiff"


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
    button.on("click", js_handler=_picking(upload, folder=False))
    button.on("dragover", js_handler="(event) => event.preventDefault()")
    button.on("drop", js_handler=f"(event) => {{ event.preventDefault(); getElement({upload.id}).addFiles(event.dataTransfer.files) }}")
    return upload


def _picking(upload: ui.upload, folder: bool) -> str:
    """What a button does that lets the browser ask for files, or for a folder."""
    input_element = f"getElement({upload.id}).$el.querySelector('input[type=file]')"
    return f"() => {{ const input = {input_element}; input.webkitdirectory = {str(folder).lower()}; input.click() }}"


class Drawing(ui.element, component="drawing.js"):
    """The preview of a photo, on which the pointer draws a rectangle or paints a mask.

    Args:
        brush: diameter of the brush, as a share of the longer side; 0 draws a rectangle.
        drawn: called with the rectangle: left, top, width and height, as shares of the photo.
        painted: called after each stroke with the mask, a PNG as a ``data:`` URL; empty if nothing is painted.
        undo: called when its key is pressed.
    """

    def __init__(
        self,
        brush: float = 0.0,
        drawn: Callable[[list[float]], Any] | None = None,
        painted: Callable[[str], Any] | None = None,
        undo: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.classes("preview")
        self._props |= {"brush": brush, "erase": False, "mask": "", "box": None}
        if drawn:
            self.on("drawn", lambda event: drawn([float(share) for share in event.args]))
        if painted:
            self.on("painted", lambda event: painted(str(event.args)))
        if undo:
            self.on("undo", undo)
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
        sha256: the hash of its file.
        size: its width and height in pixels.
        region: ``X,Y,W,H`` in pixels of the upright photo; empty for all of it.
    """

    def __init__(self, uploads: Uploads, label: str, region: bool = False, change: Callable[[], Any] | None = None) -> None:
        self.stored = self.name = self.sha256 = ""
        self.size = (0, 0)
        self._uploads, self._change = uploads, change
        self.element = ui.element("div").classes("photo")
        with self.element:
            self._build(label, region)

    def _build(self, label: str, region: bool) -> None:
        self._upload = upload_button(label, _PHOTOS, MAX_UPLOAD, self._received)
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
        size, sha256 = await asyncio.to_thread(lambda: (self._uploads.size(stored), self._uploads.sha256(stored)))
        self.size, self.sha256, self.stored, self.name = size, sha256, stored, name
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


class PhotosField:
    """Several photos of one subject: chosen as files or as a folder, each with its preview.

    Args:
        uploads: where photos are stored.
        change: called when there are other photos.

    Attributes:
        stored: the paths of the photos, in their order.
        name: the name of the first on the machine of the user, without the ending.
    """

    def __init__(self, uploads: Uploads, change: Callable[[], Any]) -> None:
        self.stored, self.name = list[str](), ""
        self._uploads, self._change = uploads, change
        with ui.element("div").classes("photo").props('role="group" aria-label="Photos"') as self.element:
            label = "Drop photos of one subject here, or press to choose them"
            self._upload = upload_button(label, _PHOTOS, MAX_UPLOAD, self._received)
            self._upload.props("multiple")
            self._upload.on("rejected", lambda: self._fail(f"A file is no photo, or larger than {MAX_UPLOAD / 2**20:.0f} MB."))
            ui.button("Choose a folder").props("flat dense").on("click", js_handler=_picking(self._upload, folder=True))
            self._problem = ui.label().classes("problem").props('role="alert"')
            self._status = ui.label().props('role="status"').classes("hint")
            self._strip = ui.row().classes("photos")
        self._problem.visible = False
        self._show()

    def take(self, stored: Sequence[str], name: str) -> None:
        """Shows photos that are stored.

        Raises:
            ImagicError: there is no such upload.
        """
        for one in stored:
            self._uploads.path(one)
        self.stored, self.name = list(stored), name
        self._show()

    async def _received(self, event: events.UploadEventArguments) -> None:
        """Adds an upload; the others of the same choice come after it."""
        self._problem.visible = False
        try:
            data = await event.file.read()
            stored = await asyncio.to_thread(self._uploads.add, event.file.name, data)
        except ImagicError as error:
            self._fail(str(error))
            return
        finally:
            self._upload.run_method("removeUploadedFiles")  # a reset would stop those that follow
        name = event.file.name.rpartition(".")[0]
        self.take([*self.stored, stored], self.name if self.stored else name)
        self._change()

    def _fail(self, text: str) -> None:
        self._problem.text, self._problem.visible = text, True

    def _show(self) -> None:
        """Shows the previews, each with a button that removes it."""
        count = len(self.stored)
        self._status.text = f"{count} photos" if count > 1 else "One photo" if count else "One photo is enough; several show more of it"
        self._strip.clear()
        with self._strip:
            for k, stored in enumerate(self.stored):
                with ui.element("div"):
                    ui.element("img").props(f'src="/uploads/{stored.rpartition("/")[2]}" alt="Photo {k + 1}" loading="lazy"')
                    button = ui.button("Remove", on_click=partial(self._remove, stored)).props("flat dense")
                    button.props(f'aria-label="Remove photo {k + 1}"')

    def _remove(self, stored: str) -> None:
        with self.element:  # the button that was pressed goes with the others
            self.take([one for one in self.stored if one != stored], self.name)
            self._change()
