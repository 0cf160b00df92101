"""Full weights: train, save and load the whole denoiser, and restore the base exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bases.altered import altered, check_unaltered
from ..bases.base import Base
from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces, shapes
from .atomic import AtomicWriter

WEIGHTS = "diffusion_pytorch_model.safetensors"

Weights = dict[str, Tensor]
"""The weights of a denoiser by name."""


@dataclass(frozen=True)
class FullWeights:
    """Stored full weights. They are large and stay on disk until :func:`loaded_full` reads them.

    Args:
        folder: of the adapter.
    """

    folder: Path


def _own_weights(base: Base) -> Weights:
    """A copy of the base's own weights in host memory.

    Raises:
        ImagicError: as :func:`check_unaltered`.
    """
    check_unaltered(base)
    return {name: value.to("cpu", copy=True) for name, value in base.denoiser.state_dict().items()}


def check_master_weights(base: Base) -> None:
    """Raises ImagicError for half-precision weights that round to nearest: updates at Imagic's learning rates would be rounded away."""
    dtype, stochastic = base.denoiser.dtype, base.runtime.memory.master_weights == "bf16-stochastic"
    if dtype != (torch.bfloat16 if stochastic else torch.float32):
        expected = (
            "bf16 weights with stochastic rounding" if stochastic else "fp32 master weights, or bf16 weights with stochastic rounding"
        )
        raise ImagicError(f"full fine-tuning of {dtype} weights", expected, "open the base with master_weights=True")


@contextmanager
def unfrozen(base: Base, restore: bool = True) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Makes every weight of the denoiser trainable while the context is open. Afterwards the weights are frozen and restored.

    Args:
        restore: False keeps the trained weights and makes no copy of the base in host memory.

    Yields:
        The parameters by name.

    Raises:
        ImagicError: as :func:`check_master_weights`; as :func:`~imagic_lora.bases.altered.altered`.
    """
    check_master_weights(base)
    own = _own_weights(base) if restore else None

    def undo() -> None:
        base.denoiser.requires_grad_(False)
        base.denoiser.zero_grad()  # an interrupted step leaves gradients, to which the next fit would add its own
        if own:
            base.denoiser.load_state_dict(own)

    with altered(base, undo):
        base.denoiser.requires_grad_(True)
        yield dict(base.denoiser.named_parameters())


def full_files(base: Base) -> tuple[str, ...]:
    """Returns the names of the files that :func:`save_full` writes: the configuration and the weights."""
    return f"{base.component}/config.json", f"{base.component}/{WEIGHTS}"


def save_full(base: Base, writer: AtomicWriter) -> None:
    """Writes the denoiser to ``<component>/`` in the format of diffusers, in half precision.

    Raises:
        ImagicError: a weight is not finite or too large for half precision.
    """
    config_file, weights_file = full_files(base)
    state = base.denoiser.state_dict()
    weights = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    for name, value in weights.items():
        if not value.isfinite().all() and state[name].isfinite().all():
            raise ImagicError(
                f"weight {name} does not fit in half precision",
                f"weights of at most {torch.finfo(torch.half).max:,.0f}",
                "use a lower --tune.learning-rate",
            )
    writer.write(config_file, [base.denoiser.to_json_string().encode()])
    writer.write(weights_file, safetensors_pieces(weights, {"format": "pt"}))


@contextmanager
def loaded_full(base: Base, folder: Path, own: Weights | None = None) -> Iterator[Weights]:
    """Loads stored full weights into the denoiser while the context is open. Afterwards the base's own weights are restored.

    Args:
        folder: of the adapter.
        own: a copy of the base's own weights in host memory, if the caller has one; None makes one.

    Yields:
        The copy of the base's own weights.

    Raises:
        ImagicError: the names or shapes differ from the base's, which is checked before anything is loaded, or a weight is not finite; as
            :func:`~imagic_lora.bases.altered.altered`.
    """
    check_unaltered(base)
    path = folder / base.component / WEIGHTS
    if shapes(path) != {name: tuple(value.shape) for name, value in base.denoiser.state_dict().items()}:
        raise ImagicError(f"{path} holds tensors of other names or shapes", "those of the base", "fit or copy the adapter again")
    copy = own or _own_weights(base)

    def undo() -> None:
        base.denoiser.load_state_dict(copy)

    with altered(base, undo):
        base.denoiser.load_state_dict(read(path))
        yield copy
