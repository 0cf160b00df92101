"""Methods without a fit: the target prompt alone, and image to image (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..bases.altered import check_unaltered
from ..core.config import EditConfig
from ..core.text import exact
from ..photos.canvas import to_canvas
from ..sampling.generate import generate
from ..sampling.pipelines import negative
from .method import Context, EditRequest, EditResult, Method, metered


class Untuned(Method):
    """Samples from the untuned base, conditioned on the embedding of the target prompt.

    Args:
        name: name of the method.
        starts: settings of stage 3 by the name of the row. Rows usually differ in the starting latents.
    """

    def __init__(self, name: str, starts: dict[str, EditConfig]) -> None:
        self.name, self.rows, self.starts = name, tuple(starts), starts
        self.settings = {row: config.model_dump() for row, config in starts.items()}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        base = context.base
        check_unaltered(base)
        canvas = to_canvas(request.photo, base.resolution, base.size_multiple)
        height, width = canvas.pixels.shape[2:]
        prompt, empty_prompt = base.encode_prompt(request.target_prompt), base.null()
        for row, config in self.starts.items():
            target = base.with_added_conditions(prompt, height, width, config.guidance_scale)
            null = None if empty_prompt is None else base.with_added_conditions(empty_prompt, height, width, config.guidance_scale)
            with metered(base) as meter:
                (image,) = generate(base, [target], [request.seed], config, canvas, negative(base, config, null), [target])
                yield EditResult(row, image, meter.cost())


def prompt_only(config: EditConfig) -> Untuned:
    """Returns the method that samples from noise and does not use the photo.

    Args:
        config: settings of stage 3; the method sets their start.
    """
    return Untuned("prompt-only", {"prompt-only": config.model_copy(update={"start": "noise"})})


def sdedit(config: EditConfig, strengths: Sequence[float]) -> Untuned:
    """Returns the method that samples from the noised photo (SDEdit), with one row for each strength.

    Args:
        config: settings of stage 3; the method sets their start and strength.
        strengths: share of the schedule that is noised and sampled again, in (0, 1].
    """
    rows = {f"sdedit-{exact(strength)}": config.model_copy(update={"start": "image", "strength": strength}) for strength in strengths}
    return Untuned("sdedit", rows)
