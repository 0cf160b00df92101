"""Uploaded photos: stored under names of our own in the folder of the queue, with a preview that is upright and has no metadata."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from ..adapters.adapter import Adapter
from ..adapters.record import SOURCE
from ..adapters.writing import delete, writable
from ..core.errors import ImagicError
from ..photos.png import png
from ..photos.reading import read_mask, read_photo
from .guard import MAX_UPLOAD
from .jobs import Queue

_NAME = r"[0-9a-f]{32}(\.[a-z0-9]{1,5})?\Z"
_PREVIEW = 768  # pixels of its longer side
_KEEP = 7 * 24 * 3600.0  # seconds that an upload without a job is kept


class Uploads:
    """The uploads of a queue.

    Args:
        queue: the queue.
    """

    def __init__(self, queue: Queue) -> None:
        self.folder = queue.root / "uploads"
        self._queue = queue

    def add(self, name: str, data: bytes) -> str:
        """Stores a photo, and returns its path relative to the folder of the queue.

        Args:
            name: its name on the machine of the user; only the ending is used.
            data: its content.

        Raises:
            ImagicError: it is no photo that ``fit`` reads, or too large.
        """
        return self._add(name, data, lambda path: read_photo(path).image)

    def add_mask(self, name: str, data: bytes, size: tuple[int, int]) -> str:
        """Stores a mask as :meth:`add` stores a photo.

        Args:
            name: its name on the machine of the user.
            data: its content.
            size: width and height of the photo.

        Raises:
            ImagicError: as :func:`~imagic_lora.photos.reading.read_mask`, or it is too large.
        """
        return self._add(name, data, lambda path: read_mask(path, size).image)

    def add_painted(self, url: str, size: tuple[int, int]) -> str:
        """Stores a mask that was painted on the preview of a photo, at the size of the photo.

        Args:
            url: a PNG as a ``data:`` URL.
            size: width and height of the photo.

        Raises:
            ImagicError: it is no PNG, nothing is painted, or it is too large.
        """
        painted = _painted(url).resize(size, Image.Resampling.BICUBIC)
        return self.add_mask("mask.png", png(painted.point([0] * 128 + [255] * 128), None), size)

    def inverted(self, painted: str, file: str, size: tuple[int, int]) -> tuple[str, str]:
        """Returns a mask whose white and black are exchanged, as it gets it: painted, or a stored file. Both are empty for an empty mask.

        Args:
            painted: a PNG as a ``data:`` URL; empty for a file, or for an empty mask.
            file: the path of a stored mask; empty without one.
            size: width and height of the photo.

        Raises:
            ImagicError: what was painted is no PNG, or the file is gone.
        """
        if file:
            image = ImageOps.invert(read_mask(self.path(file), size).image)
            return "", self.add_mask("mask.png", png(image, None), size) if image.getbbox() else ""
        image = ImageOps.invert(_painted(painted)) if painted else Image.new("L", (1, 1), 255)  # it is scaled to the photo
        url = f"data:image/png;base64,{base64.b64encode(png(image, None)).decode()}"
        return url if image.getbbox() else "", ""

    def together(self, photos: Sequence[str]) -> str:
        """Returns a path for a job that takes these photos in this order: of the photo, or of a folder that holds several.

        Args:
            photos: paths that :meth:`add` returned, at least one.

        Raises:
            ImagicError: a photo is gone, or the disk cannot be written to.
        """
        files = [self.path(photo) for photo in photos]
        if len(files) == 1:
            return photos[0]
        folder = self.folder / secrets.token_hex(16)
        with writable(self.folder):
            folder.mkdir()
            for k, file in enumerate(files):
                place = folder / f"{k:04d}{file.suffix}"
                try:
                    os.link(file, place)
                except OSError:  # a file system without links
                    shutil.copyfile(file, place)
        return f"uploads/{folder.name}"

    def mask_of(self, sha256: str) -> str | None:
        """Returns the mask with this hash that a job used; None if it is not here any more."""
        for job in reversed(self._queue.jobs()):
            stored = job.arguments.get("keep")
            if isinstance(stored, str) and stored != "auto":
                with suppress(ImagicError, OSError):  # a file that is gone is not this mask
                    if self.sha256(stored) == sha256:
                        return stored
        return None

    def _add(self, name: str, data: bytes, read: Callable[[Path], Image.Image]) -> str:
        """Stores a file that can be read, with its preview."""
        if not data or len(data) > MAX_UPLOAD:
            raise ImagicError(f"a file of {len(data):,} bytes", f"1 to {MAX_UPLOAD:,} bytes", "choose another file")
        ending = Path(name).suffix.lower()
        stored = secrets.token_hex(16) + (ending if re.match(r"\.[a-z0-9]{1,5}\Z", ending) else "")
        path = self.folder / stored
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            preview = preview_png(read(path))
        except ImagicError as error:
            path.unlink()
            shown = re.sub(r"[^A-Za-z0-9._ -]", "?", Path(name).name)[:100]
            raise ImagicError(error.got.replace(str(path), shown), error.expected, error.remedy) from error
        with writable(self.folder):
            self.preview(stored).write_bytes(preview)
        return f"uploads/{stored}"

    def size(self, stored: str) -> tuple[int, int]:
        """Returns width and height of the upright photo."""
        return read_photo(self.path(stored)).image.size

    def path(self, stored: str) -> Path:
        """Returns the file of an upload.

        Raises:
            ImagicError: the name is not one that was given here.
        """
        name = stored.removeprefix("uploads/")
        if not re.match(_NAME, name) or not (self.folder / name).is_file():
            raise ImagicError(f"no upload {stored[:80]!r}", "a photo that was uploaded", "upload it again")
        return self.folder / name

    def preview(self, stored: str) -> Path:
        """Returns the file of the preview of an upload."""
        return self.folder / f"{Path(stored).name}.preview"

    def sha256(self, stored: str) -> str:
        """Returns the hash of the bytes of an upload."""
        return hashlib.sha256(self.path(stored).read_bytes()).hexdigest()

    def sweep(self, kept: Sequence[str] = ()) -> None:
        """Deletes uploads that no job uses and that are older than a week.

        Args:
            kept: paths of uploads that are used by something else than a job.
        """
        used = {str(job.arguments.get(name)) for job in self._queue.jobs() for name in ("image", "mask", "photo", "keep")} | set(kept)
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if f"uploads/{path.name.removesuffix('.preview')}" not in used and time.time() - path.stat().st_mtime > _KEEP:
                with suppress(OSError, ImagicError):  # the next start tries again
                    delete(path) if path.is_dir() else path.unlink()


def _painted(url: str) -> Image.Image:
    """The gray image of a PNG as a ``data:`` URL.

    Raises:
        ImagicError: it is no PNG.
    """
    kind, _, text = url.partition(",")
    try:
        data = base64.b64decode(text, validate=True) if kind == "data:image/png;base64" else b""
    except binascii.Error:
        data = b""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "mask.png").write_bytes(data)
        return read_photo(path).image.getchannel("G")


def preview_png(image: Image.Image) -> bytes:
    """Returns a preview of an image as PNG: its pixels, scaled down, and nothing else of its file."""
    image.thumbnail((_PREVIEW, _PREVIEW), Image.Resampling.LANCZOS)
    return png(Image.frombytes("RGB", image.size, image.convert("RGB").tobytes()), None)


def holds_photo(adapter: Adapter) -> bool:
    """Returns whether an adapter holds its photo at full size, so that edits can be pasted into it."""
    source = adapter.record.source
    if source.withheld is not None:
        return False
    left, top, right, bottom = source.box
    return source.file is not None or (source.region is None and (right - left, bottom - top) == source.size)


def photo_of(adapter: Adapter) -> Image.Image:
    """Returns the photo of an adapter as it holds it: upright, RGB; that of a region without the photo is the region, scaled.

    Raises:
        ImagicError: the adapter was sent without its photo; a file cannot be read.
    """
    source = adapter.record.source
    if source.file is not None:
        return read_photo(adapter.listed(source.file)).image
    return read_photo(adapter.listed(SOURCE)).image.crop(source.box)
