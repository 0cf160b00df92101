"""The contact sheet of a batch: one HTML page without scripts, which loads its thumbnails when they come into view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..adapters.durable import write_text
from ..adapters.record import PREVIEW
from ..photos.page import page_template
from ..sampling.outputs import SHEET

PAGE, THUMBNAILS = "index.html", "thumbnails"
_KINDS = {"fit": "photo, reconstruction and edit of {}", "edits": "photo and edits of {}", "photo": "photo of {}"}
_WIDTH = 640  # of a thumbnail, in pixels


def write_thumbnails(out: Path, row: dict[str, Any]) -> None:
    """Writes the thumbnails of a line of the results: the preview and the sheet of the edits, or the photo where the fit failed.

    A picture that cannot be read has none.

    Args:
        out: folder of the results.
        row: from :meth:`~imagic_lora.fleet.outcome.Outcome.row`.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    (out / THUMBNAILS).mkdir(exist_ok=True)
    for kind, picture in _pictures(out, row):
        if (image := _small(picture)) is not None:
            image.save(_file(out, row["name"], kind), "JPEG", quality=85)


def has_thumbnails(out: Path, row: dict[str, Any]) -> bool:
    """Returns whether the thumbnails of a line of the results exist."""
    return all(_file(out, row["name"], kind).is_file() for kind, _ in _pictures(out, row))


def _pictures(out: Path, row: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The pictures of a line by the kind of their thumbnail."""
    if row["adapter"] is None:
        yield "photo", Path(row["photo"])
        return
    yield "fit", Path(row["adapter"]) / PREVIEW
    if row["images"]:
        yield "edits", Path(row["images"][0]["file"]).parent / SHEET


def _small(path: Path) -> Image.Image | None:
    """A picture at the size of a thumbnail, read as photos are; None if it cannot be read."""
    from ..core.errors import ImagicError
    from ..photos.reading import read_photo

    try:
        image = read_photo(path).image
    except (ImagicError, OSError):
        return None
    image.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
    return image


def _file(out: Path, name: str, kind: str) -> Path:
    return out / THUMBNAILS / f"{name}.{kind}.jpg"


def write_page(out: Path, title: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes the page of these lines of the results. All text is escaped.

    Args:
        out: folder of the results, which holds the thumbnails.
        title: heading of the page.
        rows: from :meth:`~imagic_lora.fleet.outcome.Outcome.row`; ``state`` may also be ``waiting``.

    Raises:
        ImagicError: the disk is full, or the folder cannot be written to.
    """
    shown = [row | {"thumbs": list(_thumbs(out, row)), "summary": _scores(row)} for row in rows]
    counts = Counter({"done": 0, "failed": 0, "waiting": 0}) + Counter(row["state"] for row in rows)
    failed = [row for row in rows if row["state"] == "failed"]
    text = page_template(Path(__file__).parent).render(title=title, rows=shown, failed=failed, counts=counts)
    write_text(out / PAGE, text)
    return out / PAGE


def _thumbs(out: Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The thumbnails of a line that exist, with their sizes, so that the page does not move while they are loaded."""
    for kind, _ in _pictures(out, row):
        path, alt = _file(out, row["name"], kind), _KINDS[kind]
        try:
            with Image.open(path) as image:  # reads the header only
                width, height = image.size
        except OSError:
            continue
        yield {"file": quote(f"{THUMBNAILS}/{path.name}"), "alt": alt.format(row["name"]), "width": width, "height": height}


def _scores(row: dict[str, Any]) -> str:
    """The scores of a line in words."""
    relative = row["scores"].get("relative_loss") or {}
    return "".join(f", relative loss of {stage} {value:.2f}" for stage, value in relative.items())
