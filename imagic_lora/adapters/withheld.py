"""Adapters that withhold their photo: what shows it, a record without that, and the canvas made anew from the photo's file."""

from __future__ import annotations

import hashlib
import warnings

from PIL import Image

from ..core.config import EditConfig
from ..core.errors import ImagicError, ImagicWarning
from ..photos.canvas import Canvas, fitted, to_image
from ..photos.reading import read_photo
from .adapter import Adapter
from .record import PREVIEW, PREVIEWS, SOURCE, Record, SourceRecord, WithheldRecord


def shows_photo(record: Record) -> dict[str, str]:
    """The files of an adapter that show its photo, and what each is."""
    original = {record.source.file: "the file of the photo, with its EXIF (which can hold the place)"} if record.source.file else {}
    known = {
        SOURCE: "the photo at the size of the fit",
        PREVIEW: "shows the photo and edits of it",
        PREVIEWS: "shows edits of the photo",
    }
    return {file: text for file, text in (known | original).items() if file in record.files}


def without_photo(adapter: Adapter) -> Record:
    """The record of an adapter without the files that show its photo. It says which canvas is missing; that of a withheld one stays."""
    record, source = adapter.record, adapter.record.source
    if source.withheld is not None:
        return record
    image = read_photo(adapter.listed(SOURCE)).image
    withheld = WithheldRecord(canvas=image.size, sha256=record.files[SOURCE], pixels=_sha256(image))
    files = {file: digest for file, digest in record.files.items() if file not in shows_photo(record)}
    return record.model_copy(update={"files": files, "source": source.model_copy(update={"file": None, "withheld": withheld})})


def made_canvas(name: str, source: SourceRecord, photo: Image.Image) -> Canvas:
    """Makes the canvas of a withheld photo anew, as the fit made it. Warns if it has other pixels than in the fit.

    Args:
        name: of the adapter, for the warning.
        source: the record of the photo.
        photo: the photo at its full size, whose file has the recorded hash.
    """
    assert source.withheld is not None
    canvas = fitted(photo.crop(source.fitted.box), source.withheld.canvas)
    if canvas.box != source.box or _sha256(to_image(canvas.pixels[0])) != source.withheld.pixels:
        message = f"the canvas of adapter {name}, made anew from its photo, has other pixels than in the fit: another version of Pillow?"
        warnings.warn(f"{message} Edits that start from the photo differ slightly.", ImagicWarning, stacklevel=3)
    return canvas


def require_photo(adapter: Adapter, what: str, instead: str = "") -> None:
    """Raises ImagicError if an adapter withholds its photo and nobody gave it.

    Args:
        adapter: the adapter.
        what: what needs the photo, for the message.
        instead: what to do without the photo, for the message.
    """
    if adapter.withheld and adapter.photo is None:
        source = adapter.record.source
        got = f"{what}, and adapter {adapter.name} was sent without its photo"
        raise ImagicError(got, f"the photo, the file with the SHA-256 {source.sha256}", f"add --photo FILE{instead}")


def check_start(adapter: Adapter, config: EditConfig) -> None:
    """Raises ImagicError if an edit with these settings needs the photo, and there is none."""
    if config.start != "noise":
        require_photo(adapter, f"--start {config.start} needs the photo", ", or use --start noise")
    if config.reference:
        require_photo(adapter, "--reference needs the photo", ", or use --no-reference")


def _sha256(image: Image.Image) -> str:
    """The hash of the RGB bytes of an image."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
