"""Edits pasted into the photo that an adapter was made from, so that what must not change stays as it is in the photo."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from ..adapters.adapter import Adapter
from ..adapters.contents import read_original
from ..core.errors import ImagicError, ImagicWarning
from ..photos.composite import Composite
from ..photos.mask import reduced
from ..photos.reading import read_mask
from .editor import Edit

AUTO = "auto"


@dataclass(frozen=True)
class Keep:
    """How edits are pasted into their photo.

    Args:
        composite: the photo, and where edits may change it.
        auto: whether each edit changes only what differs from the image at eta 0 with the same seed.
        metadata: ``region`` and ``keep`` for the metadata of the images.
    """

    composite: Composite
    auto: bool
    metadata: dict[str, Any]

    def etas(self, etas: Sequence[float]) -> list[float]:
        """Returns the etas to generate, in order: with ``auto``, 0 is the first of them, whether it was asked for or not."""
        return [0.0, *(eta for eta in etas if eta)] if self.auto else list(etas)

    def pasted(self, edits: Iterable[Edit], etas: Sequence[float]) -> Iterator[Edit]:
        """Pastes edits into the photo.

        Args:
            edits: edits of :meth:`etas`, in the order of :meth:`~imagic_lora.sampling.editor.Editor.edit`.
            etas: the etas that were asked for.

        Yields:
            The edits of these etas, with the whole photo as their image, and with their mask.
        """
        references: dict[int, Edit] = {}
        for edit in edits:
            mask, reference_batch = self.composite.limit, ()
            if self.auto:
                if edit.eta == 0:
                    references[edit.seed] = replace(edit, image=reduced(edit.image))
                    if 0 not in etas:
                        continue
                reference = references[edit.seed]
                mask, reference_batch = self.composite.changed(edit.image, reference.image), reference.batch
                if edit.eta and mask.getbbox() is None:
                    message = f"the edit at eta {edit.eta:g} and seed {edit.seed} shows no change: its image is the photo; raise --eta"
                    warnings.warn(message, ImagicWarning, stacklevel=2)
            image = self.composite.pasted(edit.image, mask)
            yield replace(edit, image=image, mask=self.composite.whole(mask), reference_batch=reference_batch)


@overload
def read_keep(adapter: Adapter, keep: str | Path, photo: Path | None = None) -> Keep: ...
@overload
def read_keep(adapter: Adapter, keep: str | Path | None, photo: Path | None = None) -> Keep | None: ...
def read_keep(adapter: Adapter, keep: str | Path | None, photo: Path | None = None) -> Keep | None:
    """Reads what edits of an adapter are pasted into.

    Args:
        adapter: the stored adapter.
        keep: ``auto``, or the file of a mask: white may change, black stays; None for everything in the region of the adapter.
        photo: the photo's file, for an adapter that does not hold it.

    Returns:
        None if nothing is pasted: without ``keep``, unless the adapter is that of a region.

    Raises:
        ImagicError: as :func:`~imagic_lora.adapters.contents.read_original` and :func:`~imagic_lora.photos.reading.read_mask`; the mask is
            black in the region; a photo is given and not needed.
    """
    region = adapter.record.source.region
    if keep is None and region is None:
        if photo is not None and not adapter.withheld:
            got = f"--photo {photo} without --keep, and adapter {adapter.name} is that of a whole photo"
            raise ImagicError(got, "--photo with --keep, or an adapter of a region", "leave out --photo, or add --keep auto")
        return None
    original = read_original(adapter, photo)
    metadata: dict[str, Any] = {"region": list(region)} if region else {}
    if keep is None or keep == AUTO:
        return Keep(Composite.of(original, region), keep == AUTO, metadata | ({"keep": AUTO} if keep else {}))
    mask = read_mask(Path(keep), original.size)
    return Keep(Composite.of(original, region, mask.image), False, metadata | {"keep": {"mask": mask.sha256}})
