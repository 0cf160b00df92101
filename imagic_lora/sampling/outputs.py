"""The files of an edit: their names, their metadata, the check that no other image is replaced, and the sheet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.writing import writable
from ..bases.base import Base
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..core.settings import differences
from ..core.text import exact
from ..photos.png import write_png
from ..photos.reading import read_metadata
from ..photos.region import Region
from ..photos.sheet import sheet
from .editor import Edit

SHEET = "sheet.png"


def image_name(eta: float, seed: int) -> str:
    """Returns the file name of an image."""
    return f"eta{exact(eta)}-seed{seed}.png"


def mask_name(eta: float, seed: int) -> str:
    """Returns the file name of the mask of an image."""
    return f"eta{exact(eta)}-seed{seed}.mask.png"


def image_metadata(adapter: Adapter, base: Base, config: EditConfig, prompt: str) -> dict[str, Any]:
    """Returns the metadata of the images of an edit, without eta and seed.

    Args:
        adapter: the stored adapter.
        base: the loaded base. If its weights are not those that the adapter was made for, ``forced`` names the latter.
        config: settings of the sampling.
        prompt: the target prompt.
    """
    metadata = {"adapter": adapter.name, "base": base.name, "prompt": prompt, "edit": config.model_dump()}
    made_for = adapter.record.base
    return metadata if base.fingerprint == made_for.fingerprint else metadata | {"forced": made_for.name}


def check_same_edits(paths: Iterable[Path], metadata: dict[str, Any]) -> None:
    """Raises ImagicError for a file that exists and is not the same edit, so that no image replaces another one unasked.

    Args:
        paths: files of the images.
        metadata: from :func:`image_metadata`.
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
    edits: Iterable[Edit], folder: Path, metadata: dict[str, Any], photo: Image.Image, region: Region | None = None, masks: bool = False
) -> list[dict[str, Any]]:
    """Writes every image as soon as it is generated, and the sheet at the end.

    Args:
        edits: the images.
        folder: output folder.
        metadata: written into every image, with its eta and seed.
        photo: first image of every row of the sheet. The sheet has one row for each seed, and with masks one below it.
        region: the part of the images that the sheet shows; None is all of them.
        masks: whether the masks of pasted edits are written too.

    Returns:
        ``file``, ``eta``, ``seed`` and, if it was written, ``mask`` of every image.
    """
    written: list[dict[str, Any]] = []
    rows: dict[tuple[int, str], list[tuple[str, Image.Image]]] = {}

    def save(image: Image.Image, path: Path, values: dict[str, Any]) -> None:
        with writable(folder):
            write_png(image, path, values)

    for result in edits:
        path = folder / image_name(result.eta, result.seed)
        values = metadata | {"eta": result.eta, "seed": result.seed}
        save(result.image, path, values)
        written.append({"file": str(path), "eta": result.eta, "seed": result.seed})
        label, shown = f"eta {exact(result.eta)} seed {result.seed}", region.box if region else (0, 0, *result.image.size)
        rows.setdefault((result.seed, "photo"), [("photo", photo)]).append((label, result.image.crop(shown)))
        if masks and result.mask is not None:
            path = folder / mask_name(result.eta, result.seed)
            save(result.mask, path, values)
            written[-1]["mask"] = str(path)
            rows.setdefault((result.seed, "mask"), [("white: from the edit", photo)]).append((label, result.mask.crop(shown)))
    named = {name: metadata[name] for name in ("adapter", "base", "forced") if name in metadata}
    save(sheet(list(rows.values()), metadata["prompt"]), folder / SHEET, named)
    return written


def _comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of an image without what its file name says, and without the batch size, which does not change it."""
    edit = metadata.get("edit")
    settings = {name: value for name, value in edit.items() if name != "batch_size"} if isinstance(edit, dict) else edit
    return metadata | {"edit": settings, "eta": None, "seed": None}
