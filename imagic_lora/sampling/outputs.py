"""The files of an edit: their names, the check that no other image is replaced, and the sheet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.writing import writable
from ..core.errors import ImagicError
from ..core.settings.merging import differences
from ..core.text import exact
from ..photos.png import write_png
from ..photos.reading import read_metadata
from ..photos.region import Region
from ..photos.sheet import sheet
from .editor import Edit
from .metadata import ImageMetadata, a1111_parameters, of_image

SHEET = "sheet.png"
_SAME = ("adapter", "adapter_sha256", "base", "base_fingerprint", "forced", "prompt", "edit", "region", "keep", "method")


def image_name(eta: float, seed: int, method: str = "imagic") -> str:
    """Returns the file name of an image; with an adapter of another method it has no eta."""
    return f"eta{exact(eta)}-seed{seed}.png" if method == "imagic" else f"seed{seed}.png"


def mask_name(eta: float, seed: int) -> str:
    """Returns the file name of the mask of an image."""
    return f"eta{exact(eta)}-seed{seed}.mask.png"


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


def write_edit(edit: Edit, folder: Path, metadata: dict[str, Any], embed: bool = True) -> Path:
    """Writes an image, and returns its file.

    Args:
        edit: the image.
        folder: output folder.
        metadata: written into the image, with what :func:`~imagic_lora.sampling.metadata.of_image` adds.
        embed: False writes the file without metadata.
    """
    values, path = of_image(metadata, edit), folder / image_name(edit.eta, edit.seed, metadata.get("method", "imagic"))
    parameters = a1111_parameters(ImageMetadata.model_validate(values), edit.image.size)
    with writable(folder):
        write_png(edit.image, path, values if embed else None, parameters if embed else "")
    return path


def write_edits(
    edits: Iterable[Edit],
    folder: Path,
    metadata: dict[str, Any],
    photo: Image.Image | None,
    region: Region | None = None,
    masks: bool = False,
    embed: bool = True,
) -> Iterator[dict[str, Any]]:
    """Writes every image as soon as it is generated, and the sheet at the end.

    Args:
        edits: the images.
        folder: output folder.
        metadata: written into every image, with what :func:`~imagic_lora.sampling.metadata.of_image` adds.
        photo: first image of every row of the sheet, if there is one. The sheet has one row for each seed, and with masks one below it.
        region: the part of the images that the sheet shows; None is all of them.
        masks: whether the masks of pasted edits are written too.
        embed: False writes the files without metadata.

    Yields:
        ``file``, ``eta``, ``seed`` and, if it was written, ``mask`` of every image, after its files are written.
    """
    rows: dict[tuple[int, str], list[tuple[str, Image.Image]]] = {}
    imagic = "method" not in metadata

    def save(image: Image.Image, path: Path, values: dict[str, Any]) -> None:
        with writable(folder):
            write_png(image, path, values if embed else None)

    def first(label: str) -> list[tuple[str, Image.Image]]:
        return [] if photo is None else [(label, photo)]

    for result in edits:
        written = {"file": str(write_edit(result, folder, metadata, embed)), "eta": result.eta, "seed": result.seed}
        label = f"eta {exact(result.eta)} seed {result.seed}" if imagic else f"seed {result.seed}"
        shown = region.box if region else (0, 0, *result.image.size)
        rows.setdefault((result.seed, "photo"), first("photo")).append((label, result.image.crop(shown)))
        if masks and result.mask is not None:
            path = folder / mask_name(result.eta, result.seed)
            save(result.mask, path, {name: value for name, value in of_image(metadata, result).items() if name != "pixels_sha256"})
            written["mask"] = str(path)
            rows.setdefault((result.seed, "mask"), first("white: from the edit")).append((label, result.mask.crop(shown)))
        yield written
    named = {name: metadata[name] for name in ("adapter", "base", "forced") if name in metadata}
    save(sheet(list(rows.values()), metadata["prompt"]), folder / SHEET, named)


def _comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns what makes an edit in its metadata, without what its file name says, and without the batch size, which does not change it."""
    named = {name: value for name, value in metadata.items() if name in _SAME}
    edit = metadata.get("edit")
    return named | ({"edit": {name: value for name, value in edit.items() if name != "batch_size"}} if isinstance(edit, dict) else {})
