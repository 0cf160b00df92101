"""Makes an image again from its metadata, and compares the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import ValidationError

from ..adapters.adapter import Adapter
from ..adapters.store import Store
from ..core.errors import ImagicError
from ..core.settings import differences
from ..core.text import check_utf8
from ..core.validation import first_problem
from ..photos.reading import read_metadata, read_photo
from .metadata import ImageMetadata, pixels_sha256

_REMEDY = "use the file as imagic-lora edit wrote it, and the version of imagic-lora that wrote it"


class Comparison(NamedTuple):
    """The pixels of a file and of the image that was made again.

    Args:
        identical: whether every pixel is equal to the one that was written.
        altered: whether the pixels of the file are not those that its metadata belong to.
        share: share of the pixels of the file that differ; 1 for another size.
        largest: largest difference of a channel, of 255.
    """

    identical: bool
    altered: bool
    share: float
    largest: int


def read_image(path: Path) -> tuple[ImageMetadata, Image.Image]:
    """Reads an image and its metadata.

    Raises:
        ImagicError: the file cannot be read, has no metadata, or metadata of another version or with wrong values.
    """
    values = read_metadata(path)
    if "version" not in values and "edit" in values:
        got = f"{path} has metadata of an older version of imagic-lora, which does not say enough to make the image again"
        raise ImagicError(got, "metadata of version 1", "make the image again with imagic-lora edit")
    try:
        metadata = ImageMetadata.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise ImagicError(f"the metadata of {path} are invalid: {problem.got}", problem.expected, _REMEDY) from error
    if (metadata.eta, metadata.seed) not in metadata.batch:
        got = f"the metadata of {path} contradict each other: the batch does not have the image"
        raise ImagicError(got, "eta and seed of the image in its batch", _REMEDY)
    for text in (metadata.prompt, metadata.edit.negative_prompt, metadata.base):
        check_utf8(text, f"a text in the metadata of {path}")
    return metadata, read_photo(path).image


def find_adapter(store: Store, metadata: ImageMetadata, force: bool) -> Adapter:
    """Returns the adapter of an image, also if it was renamed since.

    Args:
        store: the store that is searched.
        metadata: of the image.
        force: returns the adapter of that name even if its content has changed.

    Raises:
        ImagicError: no adapter has this content.
    """
    names = store.names()
    order = sorted(names, key=lambda name: name != metadata.adapter)
    for name in order:
        try:
            adapter = store.read(name, verify=False)
        except ImagicError:
            if name == metadata.adapter:
                raise
            continue
        if adapter.content_sha256 == metadata.adapter_sha256:
            return store.read(name)
    if metadata.adapter not in names:
        got = f"no adapter in {store.root} has the content that made the image (it was called {metadata.adapter})"
        raise ImagicError(got, "the adapter that made the image", "give its store with --store, or import the adapter")
    if force:
        return store.read(metadata.adapter)
    got = f"adapter {metadata.adapter} has changed since it made the image: its hash was {metadata.adapter_sha256[:12]}"
    raise ImagicError(got, "the same weights, embeddings and photo", "restore that adapter, or use --force to see what it makes now")


def compare(file: Image.Image, made: Image.Image, metadata: ImageMetadata) -> Comparison:
    """Compares an image with the one that was made again."""
    identical, altered = (pixels_sha256(image) == metadata.pixels_sha256 for image in (made, file))
    if file.size != made.size:
        return Comparison(identical, not altered, 1.0, 255)
    difference = np.abs(np.asarray(file.convert("RGB")).astype(int) - np.asarray(made.convert("RGB")))
    return Comparison(identical, not altered, float((difference.max(axis=-1) > 0).mean()), int(difference.max()))


def what_differs(metadata: ImageMetadata, now: dict[str, Any]) -> list[str]:
    """Returns one phrase for each thing that may change the pixels and is not as it was.

    Args:
        metadata: of the image.
        now: from :func:`~imagic_lora.sampling.metadata.image_metadata`, for the image that was made again.
    """
    then, names = metadata.model_dump(), ("adapter_sha256", "base_fingerprint", "runtime", "scheduler", "versions")
    return differences({name: then[name] for name in names}, {name: now[name] for name in names})
