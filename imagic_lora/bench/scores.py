"""How good an edit of the procedural world is: by the judge, and by its distance to the true edit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..critters import backdrop, render
from ..critters.judge import Judge
from .cases import Case
from .metrics import CritterAlignment, pixels, psnr, ssim

SAME = 0.345
"""The identity is kept up to this distance, :meth:`~imagic_lora.critters.judge.Reading.distance`; docs/critters.md says why this far."""


@dataclass(frozen=True)
class Score:
    """What one picture is worth.

    Args:
        aligned: the judge sees the asked attribute.
        kept: it sees every other attribute unchanged, the same facing, and the identity within :data:`SAME`.
        changed: names of what was not kept; ``identity`` may be among them.
        identity: distance to the true identity, in standard deviations over scenes; None where the animal faces the other way.
        background: root mean square error to the true background, of the pixels that neither the source nor the true edit covers with
            its animal, in levels of 0 to 255.
        psnr: to the true edit, in dB.
        ssim: to the true edit.
        clip: cosine distance to the true edit in the image tower of CLIP, 0 to 2.
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
        """The edit happened, and what else a caption can say stayed as it was, whatever became of the identity."""
        return self.aligned and not set(self.changed) - {"identity", "facing"}

    @property
    def success(self) -> bool:
        """The edit happened, and nothing else did."""
        return self.aligned and self.kept


class Scorer:
    """Scores pictures of a case."""

    def __init__(self, judge: Judge, clip: CritterAlignment) -> None:
        self.judge, self.clip = judge, clip

    def score(self, case: Case, image: Image.Image) -> Score:
        """The score of a picture, 64 x 64, that should show the true edit of a case."""
        (sight,) = self.judge.read_scenes(pixels([image]))
        truth = render(case.truth)
        changed = [name for name in sight.changed(case.truth) if name != case.kind]
        distance = sight.distance(case.truth)
        if distance > SAME:
            changed.append("identity" if math.isfinite(distance) else "facing")
        return Score(
            aligned=sight.attributes[case.kind] == getattr(case.truth, case.kind),
            kept=not changed,
            changed=changed,
            identity=distance if math.isfinite(distance) else None,
            background=drift(case, image),
            psnr=min(psnr(image, truth), 100.0),
            ssim=ssim(image, truth),
            clip=max(0.0, 1 - self.clip.likeness([image], [truth]).item()),
        )


def drift(case: Case, image: Image.Image) -> float:
    """The error of the background alone, as :class:`Score` has it."""
    source, truth, behind = (np.asarray(one, dtype=float) for one in (render(case.source), render(case.truth), backdrop(case.truth)))
    free = (truth == behind).all(2) & (source == np.asarray(backdrop(case.source))).all(2)
    return float(np.sqrt(np.square(np.asarray(image, dtype=float) - behind)[free].mean()))
