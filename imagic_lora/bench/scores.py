"""The scores of an edited critter image: by the judge, and by its distance to the true edit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..critters import backdrop, render
from ..critters.judge import Judge
from ..sampling.sweeps.scores import ssim
from .cases import Case
from .metrics import CritterAlignment, pixels, psnr

IDENTITY_LIMIT = 0.345
"""Greatest :meth:`~imagic_lora.critters.judge.Reading.distance` at which the identity is kept; see docs/internals/embedded-base.md."""


@dataclass(frozen=True)
class Score:
    """The scores of one edited image.

    Args:
        aligned: whether the judge recognises the requested value of the attribute that should change.
        kept: whether the judge recognises the true value of every other attribute, the true facing, and the identity within
            :data:`IDENTITY_LIMIT`.
        changed: names of the attributes that were not kept; may contain ``identity`` or ``facing``.
        identity: distance to the true identity, in standard deviations over scenes; None if the animal faces the other way.
        background: root-mean-square error of the background, in levels from 0 to 255; see :func:`drift`.
        psnr: PSNR to the true edit in dB, at most 100.
        ssim: SSIM to the true edit.
        clip: cosine distance of the CLIP image embedding to that of the true edit, 0 to 2.
    """

    aligned: bool
    kept: bool
    changed: list[str]
    identity: float | None
    background: float
    psnr: float
    ssim: float
    clip: float

    @property
    def attributes(self) -> bool:
        """Whether the edit happened and every other attribute of the caption is kept. Identity and facing do not count."""
        return self.aligned and not set(self.changed) - {"identity", "facing"}

    @property
    def success(self) -> bool:
        """Whether the edit happened and everything else is kept."""
        return self.aligned and self.kept

    def success_within(self, limit: float) -> bool:
        """Whether the edit happened, the attributes and the facing are kept, and the identity is kept within another limit.

        Args:
            limit: greatest distance of identities, in standard deviations over scenes; :data:`IDENTITY_LIMIT` gives :attr:`success`.
        """
        return self.attributes and self.identity is not None and self.identity <= limit


class Scorer:
    """Scores the edited images of a case.

    Args:
        judge: recognises the attributes and the identity of an animal in an image.
        clip: the CLIP model for image similarity.
    """

    def __init__(self, judge: Judge, clip: CritterAlignment) -> None:
        self.judge, self.clip = judge, clip

    def score(self, case: Case, image: Image.Image) -> Score:
        """Returns the scores of an edited image.

        Args:
            case: the case; its true edit is what the image should show.
            image: the edited image, RGB, 64 x 64.
        """
        (reading,) = self.judge.read_scenes(pixels([image]))
        truth = render(case.truth)
        changed = [name for name in reading.changed(case.truth) if name != case.kind]
        distance = reading.distance(case.truth)
        if distance > IDENTITY_LIMIT:
            changed.append("identity" if math.isfinite(distance) else "facing")
        return Score(
            aligned=reading.attributes[case.kind] == getattr(case.truth, case.kind),
            kept=not changed,
            changed=changed,
            identity=distance if math.isfinite(distance) else None,
            background=drift(case, image),
            psnr=min(psnr(image, truth), 100.0),
            ssim=ssim(image, truth),
            clip=max(0.0, 1 - self.clip.likeness([image], [truth]).item()),
        )


def drift(case: Case, image: Image.Image) -> float:
    """Returns the root-mean-square error of the background of an image, in levels from 0 to 255.

    It covers the pixels that the animal hides neither in the photo nor in the true edit.

    Args:
        case: the case; its true edit gives the true background.
        image: the edited image, RGB, 64 x 64.
    """
    pictures = (render(case.source), render(case.truth), backdrop(case.truth))
    source, truth, background = (np.asarray(picture, dtype=float) for picture in pictures)
    uncovered = (truth == background).all(2) & (source == np.asarray(backdrop(case.source))).all(2)
    return float(np.sqrt(np.square(np.asarray(image, dtype=float) - background)[uncovered].mean()))
