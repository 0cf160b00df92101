"""The files of an edit: their names, the check that no other image is replaced, and the sheet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.writing import writable
from ..core.errors import ImagicError
from ..core.settings import differences
from ..core.text import exact
from ..photos.png import write_png
from ..photos.reading import read_metadata
from ..photos.sheet import sheet
from .editor import Edit
from .metadata import ImageMetadata, a1111_parameters, of_image

SHEET = "sheet.png"
_SAME = ("adapter", "adapter_sha256", "base", "base_fingerprint", "forced", "prompt", "edit")


def image_name(eta: float, seed: int) -> str:
    """Returns the file name of an image."""
    return f"eta{exact(eta)}-seed{seed}.png"


def check_same_edits(paths: Iterable[Path], metadata: dict[str, Any]) -> None:
    """Raises ImagicError for a file that exists and is not the same edit, so that no image replaces another one unasked.

    Args:
        paths: files of the images.
        metadata: from :func:`~imagic_lora.sampling.metadata.image_metadata`.
    """
    for path in paths:
        if not path.exists():
            continue
        try:
            changes = "; ".join(differences(_comparable(read_metadata(path)), _comparable(metadata)))
        except ImagicError:
            changes = "it was not written by imagic-lora edit"
        if changes:
            got = f"{path} is another image: {changes}"
            raise ImagicError(got, "an unused name, or the same edit", "choose another --out, or use --overwrite")


def write_edits(
    edits: Iterable[Edit], folder: Path, metadata: dict[str, Any], photo: Image.Image, embed: bool = True
) -> list[dict[str, Any]]:
    """Writes every image as soon as it is generated, and the sheet at the end.

    Args:
        edits: the images.
        folder: output folder.
        metadata: written into every image, with what :func:`~imagic_lora.sampling.metadata.of_image` adds.
        photo: first image of every row of the sheet. The sheet has one row for each seed.
        embed: False writes the files without metadata.

    Returns:
        ``file``, ``eta`` and ``seed`` of every image.
    """
    written: list[dict[str, Any]] = []
    rows: dict[int, list[tuple[str, Image.Image]]] = {}

    def save(image: Image.Image, path: Path, values: dict[str, Any], parameters: str = "") -> None:
        with writable(folder):
            write_png(image, path, values if embed else None, parameters if embed else "")

    for result in edits:
        path = folder / image_name(result.eta, result.seed)
        values = of_image(metadata, result)
        save(result.image, path, values, a1111_parameters(ImageMetadata.model_validate(values), result.image.size))
        written.append({"file": str(path), "eta": result.eta, "seed": result.seed})
        rows.setdefault(result.seed, [("photo", photo)]).append((f"eta {exact(result.eta)} seed {result.seed}", result.image))
    named = {name: metadata[name] for name in ("adapter", "base", "forced") if name in metadata}
    save(sheet(list(rows.values()), metadata["prompt"]), folder / SHEET, named)
    return written


def _comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns what makes an edit in its metadata, without what its file name says, and without the batch size, which does not change it."""
    named = {name: value for name, value in metadata.items() if name in _SAME}
    edit = metadata.get("edit")
    return named | ({"edit": {name: value for name, value in edit.items() if name != "batch_size"}} if isinstance(edit, dict) else {})
