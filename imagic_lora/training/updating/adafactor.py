"""Adafactor without first moment: second moments as a row and a column of a matrix (arXiv 1804.04235)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Parameter

_DECAY = -0.8  # the moments of step t decay by 1 - t ** _DECAY; section 7.2 of the paper
_SMALLEST = 1e-30  # added to squared gradients


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a fixed learning rate; an update whose root mean square exceeds 1 is scaled down to 1 (sections 6 and 7).

    A weight of several dimensions counts as a matrix of its first dimension and all others, so that convolutions have small states too.
    Gradients are overwritten: an update needs no memory of its own.

    Args:
        parameters: fp32 parameters with fp32 gradients.
        learning_rate: the root mean square of an update is at most this.
    """

    def __init__(self, parameters: Iterable[Parameter], learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    update = _normalized(parameter.grad, state)
                    size = vector_norm(update) / math.sqrt(update.numel())
                    parameter.addcmul_(update, group["lr"] / size.clamp(min=1), value=-1)


def factored(shape: tuple[int, ...]) -> bool:
    """Whether the second moments of a weight of this shape are a row and a column."""
    return len(shape) > 1


def _normalized(gradient: Tensor, state: dict[str, int | Tensor]) -> Tensor:
    """Divides a gradient in place by the root of its second moments, and updates these.

    Args:
        gradient: fp32.
        state: of the parameter; empty before the first step.
    """
    state["step"] = int(state.get("step", 0)) + 1
    decay = 1 - state["step"] ** _DECAY
    if not factored(tuple(gradient.shape)):
        moments = _averaged(state, "exp_avg_sq", gradient.square(), decay)
        return gradient.mul_(moments.rsqrt())
    matrix = gradient.flatten(1)
    # squared norms instead of means of squares: the squares would take as much memory as the gradient
    rows = _averaged(state, "exp_avg_sq_row", vector_norm(matrix, dim=1).square() / matrix.shape[1], decay)
    columns = _averaged(state, "exp_avg_sq_col", vector_norm(matrix, dim=0).square() / matrix.shape[0], decay)
    matrix.mul_((rows / rows.mean()).rsqrt()[:, None]).mul_(columns.rsqrt())
    return matrix.view(gradient.shape)


def _averaged(state: dict[str, int | Tensor], name: str, squares: Tensor, decay: float) -> Tensor:
    """Updates and returns the moving average of squared gradients that a state holds under a name."""
    average = state.setdefault(name, torch.zeros_like(squares))
    assert isinstance(average, Tensor)
    return average.mul_(decay).add_(squares + _SMALLEST, alpha=1 - decay)
