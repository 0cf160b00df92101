"""Optimizers by name, and the states of each as they are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from ...memory.optimizer_states import scales_8bit, states_8bit
from .adafactor import Adafactor, factored

QUANTIZATION_MAPS = ("qmap1", "qmap2")


def build_optimizer(name: str, parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Returns Adam with 32-bit states (``adam``) or with block-wise quantised 8-bit states (``adam8bit``, arXiv 2110.02861), or Adafactor.

    Tensors with fewer than 4,096 elements always have 32-bit states. For the fake tensors of a memory plan, ``adam8bit`` allocates
    states of the same size without computing.

    Args:
        name: ``adam``, ``adam8bit`` or ``adafactor``.
        parameters: the parameters to update.
        learning_rate: the learning rate.
    """
    parameters = list(parameters)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    if name == "adafactor":
        return Adafactor(parameters, learning_rate)
    if any(isinstance(parameter, FakeTensor) for parameter in parameters):
        return _FakeAdam8bit(parameters, {})
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, lr=learning_rate)


class _FakeAdam8bit(torch.optim.Optimizer):
    """Allocates the states of Adam8bit without computing, because bitsandbytes does not support fake tensors."""

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {"states": torch.empty(states_8bit(parameter.numel()), dtype=torch.uint8)}


def state_layout(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns dtype and shape of every optimizer state of a weight."""
    moment_fp32 = torch.float32, tuple(weight.shape)
    if isinstance(optimizer, torch.optim.Adam):
        return {"step": (torch.float32, ()), "exp_avg": moment_fp32, "exp_avg_sq": moment_fp32}
    if isinstance(optimizer, Adafactor):
        if not factored(tuple(weight.shape)):
            return {"step": (torch.int64, ()), "exp_avg_sq": moment_fp32}
        row, column = ((torch.float32, (size,)) for size in (weight.shape[0], weight[0].numel()))
        return {"step": (torch.int64, ()), "exp_avg_sq_row": row, "exp_avg_sq_col": column}
    scales = scales_8bit(weight.numel())
    if not scales:
        return {"step": (torch.int64, ()), "state1": moment_fp32, "state2": moment_fp32}
    moment_8bit, block_scales = (torch.uint8, tuple(weight.shape)), (torch.float32, (scales,))
    return {"step": (torch.int64, ()), "state1": moment_8bit, "state2": moment_8bit, "absmax1": block_scales, "absmax2": block_scales}


def restored_state(value: Tensor, device: torch.device) -> Tensor | int:
    """Returns a copy of a saved state on the device, or an int for the step counter of bitsandbytes and Adafactor."""
    return int(value) if value.dtype == torch.int64 else value.to(device, copy=True)


def quantization_maps(optimizer: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the two quantization maps that all 8-bit states of bitsandbytes share; they are not saved."""
    if "state1" not in state or state["state1"].dtype != torch.uint8:
        return {}
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    return dict(zip(QUANTIZATION_MAPS, (optimizer.name2qmap["dynamic"], optimizer.name2qmap["udynamic"]), strict=True))
