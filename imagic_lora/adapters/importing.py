"""Copies an adapter from elsewhere into a store, after every check that needs no base."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ImagicError
from ..core.tensors import read
from .adapter import Adapter
from .atomic import AtomicWriter
from .contents import read_canvas, read_embeddings, read_original
from .manifest import changed_file, read_manifest
from .record import CARD, CONVERGENCE, EMBEDDINGS, PHOTO, PREVIEW, PREVIEWS, RECORD, REMEDY, SOURCE, STEPS, Record
from .store import Store, check_name
from .writing import pieces


def import_adapter(folder: Path, store: Store, name: str | None = None) -> Adapter:
    """Copies an adapter into a store, atomically. Only files that its record lists are copied, and no link is followed.

    Whether the weights fit the base is checked when an edit loads them.

    Args:
        folder: the folder of the adapter.
        store: the store that it is copied to.
        name: name in the store; None for the name of the folder.

    Raises:
        ImagicError: the folder is no adapter; a file is missing, has changed, is a link or is not expected; the weights, the embeddings or
            the photo are invalid; the name is taken.
    """
    new = check_name(name or folder.resolve().name)
    record = read_manifest(folder, RECORD, Record)
    adapter = Adapter(folder, record)
    _check_files(adapter)
    store.check_free(new, overwrite=False)
    if changed := changed_file(folder, record):
        raise ImagicError(f"{changed} is missing or has changed", "a file that matches its hash", REMEDY)
    read_embeddings(adapter)
    read_canvas(adapter)
    if record.source.file is not None:
        read_original(adapter)  # raises for a file that is not the photo
    for file in record.weight_files:
        if file.endswith(".safetensors"):
            read(adapter.listed(file))  # raises for a broken file and for numbers that are not finite

    def copy(writer: AtomicWriter) -> None:
        for file, digest in record.files.items():
            writer.write(file, pieces(folder / file))
            if writer.files[file] != digest:
                raise ImagicError(f"{folder / file} changed while it was copied", "an unchanged file", "import the adapter again")

    return store.write(record.model_copy(update={"name": new}), copy)


def _check_files(adapter: Adapter) -> None:
    """Raises ImagicError for a listed file that no adapter has, that is missing from the record, or that is a link."""
    record, photo = adapter.record, adapter.record.source.file
    if photo is not None and photo.split(".", 1)[0] != PHOTO:
        raise ImagicError(f"the record of {adapter.folder} calls the photo {photo}", f"{PHOTO} and the suffix of its format", REMEDY)
    needed = {*record.weight_files, EMBEDDINGS, *([] if adapter.withheld else [SOURCE]), *([photo] if photo else [])}
    others = {STEPS, CARD, CONVERGENCE} | (set() if adapter.withheld else {PREVIEW, PREVIEWS})
    if adapter.withheld and photo:
        got = f"the record of {adapter.folder} says that the photo is withheld, and names its file {photo}"
        raise ImagicError(got, "an adapter with its photo, or without", REMEDY)
    if unknown := sorted(record.files.keys() - needed - others):
        raise ImagicError(f"the record of {adapter.folder} lists {unknown[0]}", "the files of an adapter", REMEDY)
    for file in needed:
        adapter.listed(file)
    for file in record.files:
        path = adapter.folder / file
        if path.is_symlink() or (path.parent.is_symlink() and path.parent != adapter.folder):
            raise ImagicError(f"{path} is a link", "a regular file", "copy the file itself into the folder")
