"""Makes fake tensors on the CPU act as tensors on CUDA do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter


def _in_fp32_under_autocast(normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Casts the inputs of a normalization function to fp32 under autocast, as PyTorch does on CUDA and not on the CPU."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return normalize(*args, **kwargs)

    return function


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Makes autocast on the CPU use the precisions of autocast on CUDA."""
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(F, name, _in_fp32_under_autocast(getattr(F, name))))
        yield


def convert(module: Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
    """Replaces ``Module._apply``, which swaps fake tensors in place and fails if a weak reference to one exists."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, weight in module._parameters.items():
            module._parameters[name] = None if weight is None else Parameter(change(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return module
