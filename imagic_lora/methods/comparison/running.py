"""Runs the methods of a comparison one after another, the cheapest first, and scores their edits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps

from ...bases.base import Base
from ...core.errors import ImagicError, ImagicWarning
from ...memory.limits import is_out_of_memory
from ...photos.canvas import to_canvas
from ...sampling.sweeps.metrics import Metric, measured
from ...sampling.sweeps.scores import alignment, fidelity, ssim
from ...sampling.trajectory import predictions
from ..masks import binary
from ..method import Context, EditRequest, EditResult, Passes
from ..sampled import encode_request
from .candidates import Candidate

_BATCH = 2  # samples in a call of the denoiser that scores an image


@dataclass(frozen=True)
class Outcome:
    """What came of a method.

    Args:
        candidate: the method.
        result: its edit; None if it was left out.
        scores: scores of the edit by name.
        left_out: why there is no edit.
    """

    candidate: Candidate
    result: EditResult | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    left_out: str | None = None


class Scorer:
    """Scores edits of a photo with the base alone, and with other models.

    ``alignment`` is how much better the target prompt explains the image than the source prompt, or than the empty prompt without one:
    the mean of ``log(error(source) / error(target))``. ``fidelity`` is how near its latents are to those of the photo, 1 for equal ones.
    ``ssim`` is the structural similarity to the photo. ``outside`` is the root-mean-square change outside the mask, in levels of 255.

    Args:
        base: the base.
        request: the request that all methods get.
        metrics: scores by other models.
    """

    def __init__(self, base: Base, request: EditRequest, metrics: Sequence[Metric] = ()) -> None:
        self.base, self.request, self.metrics = base, request, metrics
        encoded = encode_request(base, request, 1.0)
        self.clean, self.target = encoded.clean, encoded.target
        self.reference = encoded.source if encoded.source is not None else encoded.null

    def score(self, image: Image.Image) -> dict[str, float]:
        """Returns the scores of an edit; those that are not finite are left out.

        Args:
            image: RGB, of the size of the photo.
        """
        canvas = to_canvas(image, self.base.resolution, self.base.size_multiple)
        latents = self.base.encode_image(canvas.pixels)
        self.base.offload_encoders()
        scores = {"fidelity": fidelity(latents[0], self.clean[0]), "ssim": ssim(image, self.request.photo)}
        if self.reference is not None:
            scores = {"alignment": alignment(self.base, latents, self.target, self.reference, _BATCH)[0]} | scores
        if self.request.mask is not None:
            scores["outside"] = _change_outside(image, self.request.photo, self.request.mask)
        return {name: value for name, value in (scores | measured(self.metrics, image)).items() if np.isfinite(value)}

    @torch.no_grad()
    def seconds_per_pass(self) -> float:
        """Measures the time of a pass of one sample through the denoiser, in seconds: the second of two calls."""
        elapsed = 0.0
        for _ in range(2):
            start = time.perf_counter()
            predictions(self.base, self.clean, 0, self.target)[0].sum().item()
            elapsed = time.perf_counter() - start
        return elapsed


def _change_outside(image: Image.Image, photo: Image.Image, mask: Image.Image) -> float:
    outside = np.asarray(ImageOps.invert(binary(mask))) > 0
    if not outside.any():
        return 0.0
    difference = np.asarray(image, dtype=float) - np.asarray(photo, dtype=float)
    return float(np.sqrt(np.square(difference[outside]).mean()))


def work(passes: Passes) -> int:
    """Returns the work of some passes in units of a forward pass: a backward pass takes about two."""
    return passes.forward + 2 * passes.backward


def whole_work(one: Candidate) -> int:
    """Returns the work of a candidate that runs, with what it makes once; 0 for one that does not run."""
    return work(one.passes) + one.once if one.method and one.passes else 0


def cheapest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sorts candidates by their predicted work; those that do not run come first."""
    return sorted(candidates, key=lambda one: whole_work(one) if one.method and one.passes else -1)


def compared(base: Base, request: EditRequest, candidates: Sequence[Candidate], scorer: Scorer, budget: float | None) -> Iterator[Outcome]:
    """Runs the candidates, the cheapest first. A method that fails, or runs out of memory, is left out with the reason.

    Args:
        base: the base.
        request: the photo, the prompts, the mask and the seed.
        candidates: the methods.
        scorer: scores the edits. Its time does not count.
        budget: seconds that the methods may take together; one that is predicted to take longer than what is left is left out. None for
            no limit.

    Yields:
        An outcome for each candidate, in the order in which they run.
    """
    pace, units, spent = scorer.seconds_per_pass(), 0, 0.0
    for one in cheapest_first(candidates):
        if one.method is None or one.passes is None:
            yield Outcome(one, left_out=one.left_out)
            continue
        predicted = pace * whole_work(one)
        if budget is not None and spent + predicted > budget:
            left = f"would take about {_seconds(predicted)}, and {_seconds(max(0.0, budget - spent))} of --budget are left"
            yield Outcome(one, left_out=left)
            continue
        start = time.perf_counter()
        try:
            (result,) = one.method.edit(Context(base), request)
        except ImagicError as error:
            spent += time.perf_counter() - start
            yield Outcome(one, left_out=f"failed: {error.got}")
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            spent += time.perf_counter() - start
            yield Outcome(one, left_out="ran out of memory")
            continue
        spent += time.perf_counter() - start
        units += result.cost.forward + 2 * result.cost.backward + one.once
        pace = spent / units if units else pace
        try:
            scores = scorer.score(result.image)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            warnings.warn(f"the scores of {one.name} ran out of memory; its edit is kept without them", ImagicWarning, stacklevel=2)
            scores = {}
        yield Outcome(one, result, scores)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"
