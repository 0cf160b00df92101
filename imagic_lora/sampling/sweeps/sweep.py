"""Sweeps of eta and seed: the images of one adapter, and their scores."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.contents import read_canvas
from ...core.config import EditConfig
from ...core.errors import NotFinite
from ...photos.canvas import to_canvas, to_image
from ..editor import Edit, Editor
from .scores import alignment, fidelity, ssim
from .suggest import RULE, RULES, search


@dataclass(frozen=True)
class Picture:
    """An image of a sweep at the resolution of the base.

    Args:
        eta, seed: what it was generated with.
        tuned: whether the adapter's weights were applied; False for the base with the adapter's embeddings alone.
        image: the image on the canvas of the photo, RGB.
        latents: its latents, ``[C, h, w]``.
    """

    eta: float
    seed: int
    tuned: bool
    image: Image.Image
    latents: Tensor


@dataclass(frozen=True)
class Scores:
    """The scores of an image.

    Args:
        eta, seed, tuned: as in :class:`Picture`.
        alignment: how much better the target prompt explains it than the embedding of the photo,
            see :func:`~imagic_lora.sampling.sweeps.scores.alignment`.
        fidelity: how much it keeps of the image at eta 0 with the same seed, the reconstruction of the photo; 1 is all, see
            :func:`~imagic_lora.sampling.sweeps.scores.fidelity`.
        ssim: structural similarity to that image, at most 1.
        ssim_photo: structural similarity to the photo, at most 1.
        others: scores of other models by name, see :mod:`~imagic_lora.sampling.sweeps.metrics`.
    """

    eta: float
    seed: int
    tuned: bool
    alignment: float
    fidelity: float
    ssim: float
    ssim_photo: float
    others: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float | int | bool]:
        """Returns all values by name, for a table or JSON."""
        values = {name: value for name, value in vars(self).items() if name != "others"}
        return values | self.others


def sampled(
    editor: Editor,
    adapter: Adapter,
    etas: Sequence[float],
    seeds: Sequence[int],
    config: EditConfig,
    prompt: str | None = None,
    tuned: bool = True,
) -> Iterator[Picture]:
    """Generates the images of a sweep.

    Args:
        editor: with the base of the adapter.
        adapter, etas, seeds, config, prompt, tuned: as for :meth:`Editor.edit`.

    Returns:
        The images in the order of :meth:`Editor.edit`.
    """
    return as_pictures(editor, adapter, editor.edit(adapter, etas, seeds, config, prompt, tuned), tuned)


def as_pictures(editor: Editor, adapter: Adapter, edits: Iterable[Edit], tuned: bool = True) -> Iterator[Picture]:
    """Yields the edits of an adapter as images of a sweep, in their order.

    Args:
        editor: with the base of the adapter.
        adapter: the adapter.
        edits: from :meth:`Editor.edit`.
        tuned: whether the adapter's weights were applied.
    """
    base = editor.base
    resolution = adapter.record.config.resolution or base.resolution
    for edit in edits:
        canvas = to_canvas(edit.image, resolution, base.size_multiple)
        yield Picture(edit.eta, edit.seed, tuned, to_image(canvas.pixels[0]), base.encode_image(canvas.pixels)[0])


def scored(
    editor: Editor,
    adapter: Adapter,
    pictures: Sequence[Picture],
    references: Sequence[Picture],
    config: EditConfig,
    prompt: str | None = None,
) -> Iterator[Scores]:
    """Scores the images of a sweep, with the adapter loaded.

    Args:
        editor: the editor that generated them.
        adapter, config, prompt: as for :func:`sampled`.
        pictures: the images.
        references: the images at eta 0 that they are compared with: one for every seed and ``tuned`` among the images. Others are ignored.

    Yields:
        The scores of each image, in order.

    Raises:
        NotFinite: a score is not finite.
    """
    embeddings = editor.conditionings(adapter, prompt)
    photo = to_image(read_canvas(adapter).pixels[0])
    by_seed = {(picture.seed, picture.tuned): picture for picture in references if picture.eta == 0}
    editor.base.offload_encoders()
    for picture in pictures:
        reference = by_seed[picture.seed, picture.tuned]
        editor.load(adapter)  # every time: the caller may have edited with another one
        (aligned,) = alignment(editor.base, picture.latents[None], embeddings["target"], embeddings["optimised"], config.batch_size)
        scores = Scores(
            picture.eta,
            picture.seed,
            picture.tuned,
            aligned,
            fidelity(picture.latents, reference.latents),
            ssim(picture.image, reference.image),
            ssim(picture.image, photo),
        )
        _check_finite(scores)
        yield scores


def find_eta(editor: Editor, adapter: Adapter, seed: int, config: EditConfig, prompt: str | None = None) -> Generator[Scores, None, float]:
    """Searches for an eta with few images, by the rule :data:`~imagic_lora.sampling.sweeps.suggest.RULE`.

    Args:
        editor: with the base of the adapter.
        seed: seed of the images.
        adapter, config, prompt: as for :func:`sampled`.

    Yields:
        The scores of every image, at most :data:`~imagic_lora.sampling.sweeps.suggest.SEARCHED`.

    Returns:
        The eta.
    """
    found: list[Picture] = []

    def scores_at(etas: Sequence[float]) -> Iterator[Scores]:
        new = list(sampled(editor, adapter, etas, [seed], config, prompt))
        found.extend(new)
        return scored(editor, adapter, new, found, config, prompt)

    return search(scores_at, RULES[RULE])


def _check_finite(scores: Scores) -> None:
    values = [value for value in scores.flat().values() if isinstance(value, float)]
    if not torch.tensor(values).isfinite().all():
        got = f"a score of the image of eta {scores.eta:g} and seed {scores.seed} is not a finite number"
        raise NotFinite(got, "finite numbers", "use --dtype fp32 or bf16")
