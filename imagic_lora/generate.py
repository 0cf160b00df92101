"""Stage 3: conditioning and denoiser to pictures, through diffusers' own pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .bases.base import Base
from .conditioning import Conditioning, concatenate
from .config import EditConfig
from .errors import ImagicError
from .images import Canvas, to_image


def generate(
    base: Base, conditionings: Sequence[Conditioning], seeds: Sequence[int], config: EditConfig, canvas: Canvas, null: Conditioning | None
) -> Iterator[Image.Image]:
    """One picture for each pair of conditioning and seed, in batches.

    Args:
        conditionings, seeds: of equal length; the noise of a picture depends on its seed alone.
        canvas: the photo as it was trained on; gives the size, and the start with ``start="image"``.
        null: the unconditional conditioning; None, or a guidance scale of 1 or less, means no guidance.

    Yields:
        Pictures at the photo's own size, in order, as batches are done.

    Raises:
        ImagicError: as :func:`refuse_no_steps`; a sampler that cannot take ``ddim_eta``; a picture
            holds NaN.
    """
    refuse_no_steps(config)
    for start in range(0, len(seeds), config.batch_size):
        part = slice(start, start + config.batch_size)
        pixels = _batch(base, concatenate(list(conditionings[part])), list(seeds[part]), config, canvas, null)
        if pixels.isnan().any():
            raise ImagicError("a generated picture holds NaN", "numbers", "try --dtype fp32 or bf16")
        yield from (canvas.restored(to_image(one)) for one in pixels * 2 - 1)


def refuse_empty(prompt: str) -> None:
    """Raises ImagicError for a prompt of nothing but spaces."""
    if not prompt.strip():
        raise ImagicError("an empty prompt", "a sentence that says what the edited photo shows", 'for example "a dog jumping"')


def refuse_no_steps(config: EditConfig) -> None:
    """Raises ImagicError if the strength leaves the sampler less than one of its steps to take from the image."""
    if config.start == "image" and int(config.steps * config.strength) < 1:
        got = f"strength {config.strength:g} of {config.steps} steps"
        raise ImagicError(got, "at least one step: strength times steps is 1 or more", "raise one of them")


def _batch(base: Base, text: Conditioning, seeds: list[int], config: EditConfig, canvas: Canvas, null: Conditioning | None) -> Tensor:
    """Pixels in [0, 1], ``[B, 3, H, W]``."""
    batch, device, dtype = len(seeds), base.runtime.device, base.runtime.dtype
    guided = null is not None and config.guidance_scale > 1
    arguments: dict[str, Any] = {
        "prompt_embeds": text.to(device, dtype).tokens,
        "negative_prompt_embeds": null.expand(batch).to(device, dtype).tokens if null is not None and guided else None,
        "guidance_scale": config.guidance_scale if guided else 1.0,
        "num_inference_steps": config.steps,
        "eta": config.ddim_eta,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent",
    }
    if config.start == "image":
        arguments |= {"image": ((canvas.pixels + 1) / 2).expand(batch, -1, -1, -1), "strength": config.strength}
    else:
        arguments |= {"height": canvas.pixels.shape[2], "width": canvas.pixels.shape[3]}
    pipe = base.pipeline("image2image" if config.start == "image" else "text2image")
    if config.ddim_eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:  # pyright: ignore[reportAttributeAccessIssue]
        got = f"ddim_eta {config.ddim_eta:g} with a sampler of kind {type(pipe.scheduler).__name__}"  # pyright: ignore[reportAttributeAccessIssue]
        raise ImagicError(got, "DDIM, which alone has it", "leave ddim_eta at 0")
    mixed = base.denoiser.dtype != dtype
    with torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False):
        latents = pipe(**arguments).images  # pyright: ignore[reportCallIssue]
    return (base.decode(latents) / 2 + 0.5).clamp(0, 1)
