"""The field that takes a mask: painted on the photo, or a file. What is white, and coloured on the photo, may change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from nicegui import events, ui

from ...core.errors import ImagicError
from ..guard import MAX_UPLOAD
from ..uploads import Uploads
from .photos import Drawing, upload_button

_BRUSH = 0.08  # of the longer side
_STEPS = 50  # that can be undone


class _Mask(NamedTuple):
    """A mask: a ``data:`` URL if it was painted, a path if it is a stored file, and what is said of the file."""

    painted: str = ""
    file: str = ""
    note: str = ""


class MaskField:
    """A mask of what may change, with the tools to paint it: paint, erase, size, undo, invert, clear.

    Args:
        uploads: where masks are stored.
        change: called when there is another mask.
    """

    def __init__(self, uploads: Uploads, change: Callable[[], Any] = int) -> None:
        self._mask, self._before = _Mask(), list[_Mask]()
        self._uploads, self._change = uploads, change
        self._url, self._size = "", (0, 0)
        with ui.element("div").classes("mask").props('role="group" aria-label="Mask"') as self.element:
            self._drawing = Drawing(_BRUSH, painted=self._painted, undo=self._undo)
            with ui.row().classes("buttons"):
                tool = ui.toggle({False: "Paint", True: "Erase"}, value=False).props('no-caps dense aria-label="Tool"')
                tool.on_value_change(lambda: self._drawing.set(erase=bool(tool.value)))
                self._undo_button = ui.button("Undo", on_click=self._undo).props("flat dense")
                ui.button("Invert", on_click=self._invert).props("flat dense")
                ui.button("Clear", on_click=lambda: self._show(_Mask())).props("flat dense")
            with ui.row().classes("brush"):
                ui.label("Brush")
                size = ui.slider(min=0.01, max=0.3, step=0.01, value=_BRUSH).props('aria-label="Size of the brush"')
                size.on_value_change(lambda: self._drawing.set(brush=size.value or _BRUSH))
            self._upload = upload_button("Or use a mask file: press, or drop it here", "image/*", MAX_UPLOAD, self._received)
            self._status = ui.label().props('role="status"').classes("hint")
            self._problem = ui.label().classes("problem").props('role="alert"')
        self.clear()

    @property
    def painted(self) -> str:
        """The painted mask as a ``data:`` URL; empty without one."""
        return self._mask.painted

    @property
    def file(self) -> str:
        """The path of a mask that is a file; empty without one."""
        return self._mask.file

    @property
    def draft(self) -> dict[str, str]:
        """What a draft keeps of the mask."""
        return {"painted": self.painted, "file": self.file}

    def ticked(self, before: bool, stored: str) -> bool:
        """Whether the box of the mask is ticked for a photo that has just arrived.

        Args:
            before: whether it was; a tick without a mask is for this photo, which was still on its way.
            stored: the path of the mask of this photo; empty without one.
        """
        return bool(stored) or (before and not (self.painted or self.file))

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
        """Removes the mask, and what could be undone."""
        self._show(_Mask())
        self._before.clear()
        self._undo_button.disable()

    def take(self, painted: str, file: str, note: str = "From a file") -> None:
        """Shows a mask that was painted, or one that is stored.

        Args:
            painted: a PNG as a ``data:`` URL; empty for a stored one.
            file: the path of a stored one; empty for a painted one.
            note: what is said of a stored one.

        Raises:
            ImagicError: there is no such upload.
        """
        if file:
            self._uploads.path(file)
        self._show(_Mask(painted, file, note))

    async def stored(self) -> str:
        """Returns the path of the mask for a job; empty without one.

        Raises:
            ImagicError: as :meth:`~imagic_lora.web.uploads.Uploads.add_painted`.
        """
        return await asyncio.to_thread(self._uploads.add_painted, self.painted, self._size) if self.painted else self.file

    def _painted(self, url: str) -> None:
        """Takes what the browser shows already."""
        self._take(_Mask(url))
        self._drawing.props["mask"] = url

    def _show(self, mask: _Mask) -> None:
        self._take(mask)
        self._drawing.set(mask=mask.painted or (f"/uploads/{mask.file.rpartition('/')[2]}" if mask.file else ""))

    def _take(self, mask: _Mask) -> None:
        if mask != self._mask:
            self._before = [*self._before[-_STEPS + 1 :], self._mask]
            self._undo_button.enable()
        self._mask = mask
        self._problem.visible = False
        said = f"{mask.note}: what is coloured may change"
        self._status.text = "Painted: what is coloured may change" if mask.painted else said if mask.file else "Paint what may change"
        self._change()

    def _undo(self) -> None:
        """Shows the mask before the last stroke, or before the last other change."""
        if self._before:
            self._show(self._before.pop())
            self._before.pop()  # the one that was undone
        self._undo_button.set_enabled(bool(self._before))

    async def _invert(self) -> None:
        """Exchanges what may change and what stays."""
        try:
            mask = await asyncio.to_thread(self._uploads.inverted, self.painted, self.file, self._size)
        except ImagicError as error:
            self._fail(error)
            return
        self._show(_Mask(*mask, note=self._mask.note))

    async def _received(self, event: events.UploadEventArguments) -> None:
        """Stores a mask file and shows it."""
        try:
            data = await event.file.read()
            file = await asyncio.to_thread(self._uploads.add_mask, event.file.name, data, self._size)
            self.take("", file)
        except ImagicError as error:
            self._fail(error)
        finally:
            self._upload.reset()

    def _fail(self, error: ImagicError) -> None:
        self._problem.text, self._problem.visible = str(error), True
