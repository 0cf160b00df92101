"""The whole denoiser as what is trained and stored, with an exact way back to the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .bases.base import Base
from .errors import ImagicError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@contextmanager
def _restored(base: Base) -> Iterator[None]:
    """Whatever happens to the denoiser's weights inside is undone afterwards, bit for bit, from a copy in host memory."""
    before = {name: value.to("cpu", copy=True) for name, value in base.denoiser.state_dict().items()}
    try:
        yield
    finally:
        base.denoiser.load_state_dict(before)


def refuse_half(base: Base) -> None:
    """Raises ImagicError for weights in half precision: steps at Imagic's rates would round to nothing."""
    if base.denoiser.dtype != torch.float32:
        got = f"full fine-tuning on {base.denoiser.dtype} weights"
        raise ImagicError(got, "fp32 master weights", "open the base with master_weights=True")


@contextmanager
def unfrozen(base: Base) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Every weight of the denoiser trainable; frozen and as before afterwards.

    Raises:
        ImagicError: the weights are not fp32: at Imagic's rates, steps in half precision round to nothing.
    """
    refuse_half(base)
    with _restored(base):
        base.denoiser.requires_grad_(True)
        try:
            yield dict(base.denoiser.named_parameters())
        finally:
            base.denoiser.requires_grad_(False)


def save_full(base: Base, folder: Path) -> None:
    """Writes the denoiser into ``folder/<component>/`` in diffusers' own format, half precision.

    Raises:
        ImagicError: a weight is too large for half precision.
    """
    target = folder / base.component
    weights = {name: value.detach().half().cpu().contiguous() for name, value in base.denoiser.state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ImagicError(f"weight {name} does not fit in half precision", "finite weights", "use a lower --tune.learning-rate")
    base.denoiser.save_config(target)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def loaded_full(base: Base, folder: Path) -> Iterator[None]:
    """The denoiser with the stored weights; the base's own afterwards."""
    with _restored(base):
        base.denoiser.load_state_dict(load_file(folder / base.component / WEIGHTS))
        yield
