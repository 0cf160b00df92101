"""The optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter

from .errors import ImagicError


def build_optimizer(name: str, parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with its states in 32 bits (``adam``), or in 8 bits by blocks (``adam8bit``, arXiv 2110.02861).

    Tensors under 4,096 elements keep 32-bit states in either.

    Raises:
        ImagicError: bitsandbytes is asked for and cannot be imported.
    """
    refuse_missing(name)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, foreach=True)
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, lr=learning_rate)


def refuse_missing(name: str) -> None:
    """Raises ImagicError if an optimiser's library cannot be imported."""
    if name != "adam8bit":
        return
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ImagicError(
            f"adam8bit, but bitsandbytes cannot be imported ({error})", "a working bitsandbytes", "pip install bitsandbytes, or use adam"
        ) from error
