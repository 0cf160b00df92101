"""Makes an image again from its metadata, and compares the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import ValidationError

from ..adapters.adapter import Adapter
from ..adapters.store import Store
from ..core.errors import ImagicError
from ..core.settings.merging import differences
from ..core.text import check_utf8
from ..core.validation import first_problem
from ..photos.reading import read_metadata, read_photo
from .editor import Edit, Editor
from .keep import AUTO, Keep, read_keep
from .metadata import ImageMetadata, MaskMetadata, pixels_sha256

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
    if (metadata.keep == AUTO) != ((0, metadata.seed) in (metadata.reference_batch or ())):
        got = f"the metadata of {path} contradict each other: keep auto and the batch of the image at eta 0"
        raise ImagicError(got, "the batch of the image at eta 0 with keep auto, and only then", _REMEDY)
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


def read_pasting(adapter: Adapter, metadata: ImageMetadata, mask: Path | None, photo: Path | None) -> Keep | None:
    """Returns how an image was pasted into its photo; None if it was not.

    Args:
        adapter: the adapter of the image.
        metadata: of the image.
        mask: the file of the mask, for an image that was made with one.
        photo: the photo's file, for an adapter that does not hold it.

    Raises:
        ImagicError: the mask is missing, another one, or not needed; as :func:`~imagic_lora.sampling.keep.read_keep`.
    """
    wanted = metadata.keep
    if not isinstance(wanted, MaskMetadata):
        if mask is not None:
            raise ImagicError(f"--keep {mask} for an image that was made without a mask", "no mask", "leave out --keep")
        return read_keep(adapter, wanted, photo)
    expected = f"the file with the SHA-256 {wanted.mask}"
    if mask is None:
        raise ImagicError("the image was made with edit --keep MASK.png, and no mask is given", expected, "add --keep with that mask")
    keep = read_keep(adapter, mask, photo)
    if keep is None or keep.metadata["keep"] != wanted.model_dump():
        raise ImagicError(f"{mask} is not the mask that the image was made with", expected, "use the original file of the mask")
    return keep


def batches(metadata: ImageMetadata) -> list[list[tuple[float, int]]]:
    """Returns the batches to generate: that of the image, and before it that of the image at eta 0 which it was compared with."""
    reference = metadata.reference_batch
    return [metadata.batch] if reference in (None, metadata.batch) else [reference, metadata.batch]


def generate_again(editor: Editor, adapter: Adapter, metadata: ImageMetadata) -> Iterator[Edit]:
    """Generates the images of the :func:`batches` of an image, each in its own batch."""
    prompt = None if metadata.prompt == adapter.record.prompt else metadata.prompt
    for batch in batches(metadata):
        yield from editor.edit_pairs(adapter, batch, metadata.edit.model_copy(update={"batch_size": len(batch)}), prompt)


def finish(edits: Iterable[Edit], metadata: ImageMetadata, keep: Keep | None) -> Edit:
    """Returns the image itself among the images of :func:`generate_again`, pasted into the photo as it was."""
    found = {(edit.eta, edit.seed): edit for edit in edits}
    image = found[metadata.eta, metadata.seed]
    if keep is None:
        return image
    references = [found[0.0, metadata.seed]] if keep.auto and metadata.eta else []
    (pasted,) = keep.pasted([*references, image], [metadata.eta])
    return pasted


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
    then, names = metadata.model_dump(mode="json"), ("adapter_sha256", "base_fingerprint", "runtime", "scheduler", "versions", "region")
    was, is_now = ({name: values[name] for name in names if name in values} for values in (then, now))
    return differences(was, is_now)
