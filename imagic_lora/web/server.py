"""The server of the studio: files, the page, the supervisor of the worker."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from fastapi.responses import FileResponse, Response
from nicegui import app, ui

from ..adapters.record import CONVERGENCE, PREVIEW, PREVIEWS, SOURCE
from ..adapters.store import check_name
from ..core.errors import ImagicError
from .guard import Access, Guard
from .pages.page import build
from .running import OUTPUT
from .studio import Studio
from .uploads import photo_of, preview_png

_OF_ADAPTERS = (PREVIEW, SOURCE, CONVERGENCE, PREVIEWS)
_PATH = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,3}\Z"
_SHOWN = {".png": "image/png", ".html": "text/html; charset=utf-8"}
_EVERY = 0.5  # seconds between two looks of the supervisor
_PAGE_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'none'"


def serve(studio: Studio, access: Access, port: int, show: bool) -> None:
    """Serves the studio until it is interrupted; the worker then saves what it does and ends.

    Args:
        studio: the studio.
        access: who may enter, and the address to listen on.
        port: the port.
        show: whether the page is opened in the browser.
    """
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(studio.queue.root / "page"))
    app.add_middleware(Guard, access=access)
    _add_files(studio)

    @ui.page("/", title="imagic-lora", dark=None)
    def page(tab: str = "fit") -> None:
        build(studio, tab)

    async def check() -> None:
        await asyncio.to_thread(studio.supervisor.check)

    app.on_startup(lambda: studio.uploads.sweep(studio.masks.sweep()))
    app.on_startup(lambda: app.timer(_EVERY, check))
    app.on_shutdown(studio.supervisor.close)
    ui.run(
        host=access.host, port=port, show=show, reload=False, title="imagic-lora", dark=None, tailwind=False, language="en-US",
        show_welcome_message=False, reconnect_timeout=30.0, ws_max_size=2**20, server_header=False,
    )  # fmt: skip


def _add_files(studio: Studio) -> None:
    """Adds the addresses of images. Names are checked before they become paths, and a path must be inside its folder."""

    @app.get("/uploads/{name}")
    def upload(name: str) -> FileResponse:
        with _missing():
            studio.uploads.path(name)
            return _file(studio.uploads.folder, studio.uploads.preview(name).name, "image/png")

    @app.get("/adapters/{name}/photo")
    def photo(name: str) -> Response:
        with _missing():
            image = photo_of(studio.store.read(check_name(name), verify=False))
            return Response(preview_png(image), media_type="image/png", headers={"Cache-Control": "private, no-cache"})

    @app.get("/adapters/{name}/{file}")
    def of_adapter(name: str, file: str) -> FileResponse:
        with _missing():
            if file not in _OF_ADAPTERS:
                raise HTTPException(404)
            return _file(studio.store.root / check_name(name), file, "image/png")

    @app.get("/jobs/{job_id}/{path:path}")
    def of_job(job_id: str, path: str, download: bool = False) -> FileResponse:
        with _missing():
            folder = studio.queue.folder(job_id)
            if not re.match(_PATH, path) or not (path.startswith(f"{OUTPUT}/") or re.match(r"preview-[0-9]+\.png\Z", path)):
                raise HTTPException(404)
            return _file(folder, path, None if download else _SHOWN.get(Path(path).suffix))


class _missing:
    """Turns an error about a name into the status 404."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ImagicError):
            raise HTTPException(404) from error


def _file(folder: Path, name: str, media: str | None) -> FileResponse:
    """Returns a file of a folder; one of another type than an image or a page is a download."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise HTTPException(404)
    headers = {"Cache-Control": "private, no-cache"} | ({"Content-Security-Policy": _PAGE_POLICY} if path.suffix == ".html" else {})
    if media is None:
        return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers=headers)
    return FileResponse(path, media_type=media, headers=headers)
