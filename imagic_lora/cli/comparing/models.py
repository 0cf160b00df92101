"""The models besides the base that ``compare`` loads: the captioner, and those of the scores."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ...core.errors import ImagicError
from ...methods.comparison.captions import CAPTIONER, captioned
from ...methods.method import EditRequest
from ...sampling.sweeps.metrics import Metric, clip_metric, dino_metric
from ..console import err, plain

AUTO = "auto"
"""The value of ``--source`` that asks for a caption by a model."""


@dataclass(frozen=True)
class Models:
    """The models besides the base that a comparison loads.

    Args:
        captioner: folder or hub id of ``--captioner``.
        clip: folder or hub id of ``--clip``.
        dino: folder or hub id of ``--dino``.
        offline: whether they are taken from the cache of the hub only.
    """

    captioner: str | None
    clip: str | None
    dino: str | None
    offline: bool

    def check(self, source: str | None) -> None:
        """Raises ImagicError if a flag has no effect.

        Args:
            source: the value of ``--source``.
        """
        if self.captioner is not None and source != AUTO:
            raise ImagicError("--captioner without --source auto", "both, or neither", "add --source auto, or leave out --captioner")
        if self.offline and not (source == AUTO or self.clip or self.dino):
            got = "--offline without --source auto, --clip and --dino"
            raise ImagicError(got, "a model to take from the cache", "leave out --offline")

    def caption(self, photo: Image.Image) -> tuple[str, str]:
        """Returns a caption of the photo, which it prints, and the captioner.

        Raises:
            ImagicError: as :func:`captioned`.
        """
        model = self.captioner or CAPTIONER
        caption = captioned(photo, model, self.offline)
        err.print(f"Source prompt: {plain(caption)}", highlight=False)
        return caption, model

    def metrics(self, request: EditRequest) -> list[Metric]:
        """Loads the models that score the edits.

        Raises:
            ImagicError: one cannot be loaded.
        """
        found = []
        if self.clip is not None:
            found.append(clip_metric(self.clip, self.offline, request.photo, request.target_prompt, request.source_prompt))
        if self.dino is not None:
            found.append(dino_metric(self.dino, self.offline, request.photo))
        return found
