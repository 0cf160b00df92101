"""Stage 3: generates images from conditionings and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from ..bases.base import Base
from ..bases.process import Flow
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..photos.canvas import Canvas, to_image
from .checks import check_pixels, check_sampling
from .diffusion import DiffusionSampler
from .flow import FlowSampler


def generate(
    base: Base,
    conditionings: Sequence[Conditioning],
    seeds: Sequence[int],
    config: EditConfig,
    canvas: Canvas,
    null: Conditioning | None,
    sources: Sequence[Conditioning],
) -> Iterator[Image.Image]:
    """Generates one image for each pair of conditioning and seed, in batches.

    Args:
        base: the base with the adapter applied.
        conditionings: the conditioning ``e_eta`` of each image.
        seeds: the seed of each image, as many as conditionings; the noise of an image depends only on its seed.
        config: settings of the sampling.
        canvas: the photo that the adapter was trained on; it gives the image size, and the start for ``start="image"`` or ``"inverted"``.
        null: what guidance leads away from, see :func:`~imagic_lora.sampling.pipelines.negative`; None, or a guidance scale of 1 or less,
            turns guidance off.
        sources: the conditioning of the photo for each image, used to invert it with ``start="inverted"``; the inversion runs once for
            each pair of seed and conditioning object.

    Yields:
        Images at the size of the photo, in order, after each batch.

    Raises:
        ImagicError: the strength leaves no sampling step, the scheduler does not support ``ddim_eta``, the pipeline has no
            ``guidance_rescale``, or an image holds NaN.
    """
    check_sampling(config)
    sampler = (FlowSampler if isinstance(base.process, Flow) else DiffusionSampler)(base, config, canvas, null)
    for start in range(0, len(seeds), config.batch_size):
        batch = slice(start, start + config.batch_size)
        latents = sampler.latents(conditionings[batch], seeds[batch], sources[batch])
        pixels = (base.decode(latents) / 2 + 0.5).clamp(0, 1)
        check_pixels(pixels)
        yield from (canvas.restored(to_image(image)) for image in pixels * 2 - 1)
