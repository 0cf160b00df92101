"""Editing without a fit: the sentence alone, and image to image (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..core.config import EditConfig
from ..photos.canvas import to_canvas
from ..sampling.generate import generate
from .method import Context, EditRequest, EditResult, Method, metered


class Untuned(Method):
    """Pictures of the untuned base at the embedding of the sentence, one for each way to start.

    Args:
        starts: settings of a row, by its name.
    """

    def __init__(self, name: str, starts: dict[str, EditConfig]) -> None:
        self.name, self.rows, self.starts = name, tuple(starts), starts
        self.settings = {row: config.model_dump() for row, config in starts.items()}

    def pictures(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        base = context.base
        canvas = to_canvas(request.photo, base.resolution, base.size_multiple)
        high, wide = canvas.pixels.shape[2:]
        sentence, empty = base.encode_prompt(request.text), base.null()
        for row, config in self.starts.items():
            text = base.with_added_conditions(sentence, high, wide, config.guidance_scale)
            null = None if empty is None else base.with_added_conditions(empty, high, wide, config.guidance_scale)
            with metered(base) as meter:
                (image,) = generate(base, [text], [request.seed], config, canvas, null, [text])
                yield EditResult(row, image, meter.cost())


def prompt_only(config: EditConfig) -> Untuned:
    """From noise: nothing is known of the photo."""
    return Untuned("prompt-only", {"prompt-only": config.model_copy(update={"start": "noise"})})


def sdedit(config: EditConfig, strengths: Sequence[float]) -> Untuned:
    """From the photo, noised by each strength."""
    return Untuned("sdedit", {f"sdedit-{s:g}": config.model_copy(update={"start": "image", "strength": s}) for s in strengths})
