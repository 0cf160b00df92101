"""Encodes photo and prompt of a fit."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..adapters.word import new_word
from ..bases.base import Base
from ..core.config import RunConfig
from ..core.runtime import Processes
from ..core.tensors import check_finite
from ..memory.out_of_memory import explain_out_of_memory
from ..photos.canvas import Canvas, to_canvas
from ..photos.reading import Photo
from ..photos.region import Region
from ..sampling.pipelines import negative
from .monitoring.convergence import Convergence
from .monitoring.previews import Previews
from .run import Run


def encode_photo(config: RunConfig, base: Base, photo: Photo, region: Region | None) -> tuple[Canvas, Tensor]:
    """Returns a photo, or its region, on its canvas, and its latents ``[1, C, h, w]``.

    Raises:
        ImagicError: the region is too small for the base, memory runs out, or the latents are not finite.
    """
    if region:
        region.check_size(base.size_multiple)
    fitted = photo.image.crop(region.box) if region else photo.image
    canvas = to_canvas(fitted, config.resolution or base.resolution, base.size_multiple)
    with explain_out_of_memory(base.architecture, config, base.runtime, "encode"):
        latents = base.encode_image(canvas.pixels)
    check_finite({"the latents of the photo": latents})
    return canvas, latents


def encode_run(
    config: RunConfig,
    base: Base,
    photo: Photo,
    prompt: str,
    processes: Processes,
    region: Region | None,
    store_photo: bool,
    encoded_photo: tuple[Canvas, Tensor],
) -> Run:
    """Encodes the prompt of a run. Text encoders and VAE stay where they are.

    Args:
        encoded_photo: as :func:`encode_photo` returns it.

    Raises:
        ImagicError: memory runs out, or a text encoder returns numbers that are not finite.
    """
    canvas, latents = encoded_photo
    height, width = canvas.pixels.shape[2:]
    scale = config.edit.guidance_scale
    word = new_word(base, prompt, config.inversion) if config.method == "textual-inversion" else None
    if word:
        encoded = word.encode(base, prompt)
    else:
        encoded = base.encode_vectors(prompt) if config.encodes_while_training else base.encode_prompt(prompt)
    target, null = base.with_added_conditions(encoded, height, width, scale), base.null()
    null = None if null is None else base.with_added_conditions(null, height, width, scale)
    if config.embed.tokens == "words":
        target = replace(target, mask=base.word_mask(prompt))
        null = null and replace(null, mask=base.word_mask(""))
    embeddings = {"the embedding of the target prompt": target} | ({"the embedding of the empty prompt": null} if null else {})
    check_finite({f"{name} ({part})": value for name, embedding in embeddings.items() for part, value in embedding.tensors().items()})
    inputs = canvas, latents, target, null, negative(base, config.edit, null)
    return Run(config, base, photo, region, store_photo, prompt, processes, *inputs, Convergence(config), Previews(config), word=word)
