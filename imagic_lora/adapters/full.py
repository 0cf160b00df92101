"""The whole denoiser as what is trained and stored, with an exact way back to the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..bases.base import Base
from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces, shapes
from .atomic import AtomicWriter

WEIGHTS = "diffusion_pytorch_model.safetensors"


Weights = dict[str, Tensor]
"""The weights of a denoiser by name."""


@contextmanager
def _restored(base: Base, own: Weights | None = None) -> Iterator[Weights]:
    """Whatever happens to the denoiser's weights inside is undone afterwards, bit for bit, from a copy in host memory: the one given, or a
    new one."""
    own = own or {name: value.to("cpu", copy=True) for name, value in base.denoiser.state_dict().items()}
    try:
        yield own
    finally:
        base.denoiser.load_state_dict(own)


def check_master_weights(base: Base) -> None:
    """Raises ImagicError for weights in half precision that are rounded to nearest: steps at Imagic's rates would come to nothing."""
    found, stochastic = base.denoiser.dtype, base.runtime.memory.master_weights == "bf16-stochastic"
    if found != (torch.bfloat16 if stochastic else torch.float32):
        right = "bf16 weights, rounded stochastically" if stochastic else "fp32 master weights, or bf16 weights that round stochastically"
        raise ImagicError(f"full fine-tuning on {found} weights", right, "open the base with master_weights=True")


@contextmanager
def unfrozen(base: Base, restore: bool = True) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Every weight of the denoiser trainable; frozen and as before afterwards.

    Args:
        restore: False leaves the trained weights in, and spares the copy of the base in host memory.

    Raises:
        ImagicError: as :func:`check_master_weights`.
    """
    check_master_weights(base)
    with _restored(base) if restore else nullcontext():
        base.denoiser.requires_grad_(True)
        try:
            yield dict(base.denoiser.named_parameters())
        finally:
            base.denoiser.requires_grad_(False)


def full_files(base: Base) -> tuple[str, ...]:
    """The files of :func:`save_full`."""
    return f"{base.component}/config.json", f"{base.component}/{WEIGHTS}"


def save_full(base: Base, writer: AtomicWriter) -> None:
    """Writes the denoiser into ``<component>/`` in diffusers' own format, half precision.

    Raises:
        ImagicError: a weight is not finite, or too large for half precision.
    """
    config, file = full_files(base)
    state = base.denoiser.state_dict()
    weights = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    for name, value in weights.items():
        if not value.isfinite().all() and state[name].isfinite().all():
            raise ImagicError(f"weight {name} does not fit in half precision", "finite weights", "use a lower --tune.learning-rate")
    writer.write(config, [base.denoiser.to_json_string().encode()])
    writer.write(file, safetensors_pieces(weights, {"format": "pt"}))


@contextmanager
def loaded_full(base: Base, folder: Path, own: Weights | None = None) -> Iterator[Weights]:
    """The denoiser with the stored weights; the base's own afterwards.

    Args:
        own: those, where they were copied before.

    Yields:
        The base's own weights, in host memory.

    Raises:
        ImagicError: other names or shapes than the base's, which is seen before anything is loaded, or weights that are not finite.
    """
    path = folder / base.component / WEIGHTS
    if shapes(path) != {name: tuple(value.shape) for name, value in base.denoiser.state_dict().items()}:
        raise ImagicError(f"{path} holds tensors of other names or shapes", "those of the base", "fit or copy the adapter again")
    with _restored(base, own) as own:
        base.denoiser.load_state_dict(read(path))
        yield own
