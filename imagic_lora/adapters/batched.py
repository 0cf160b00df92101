"""LoRA layers of several adapters on one denoiser: each part of a batch passes through those of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv2d, Linear, Parameter

from ..bases.altered import altered
from ..bases.base import Base
from ..core.config import TuneConfig
from ..core.errors import ImagicError
from .lora import attached

Delta = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the input of a layer ``[n, m, ...]`` and the matrices of ``n`` adapters, ``[n, rank, in, ...]`` and ``[n, out, rank, ...]``, the
change of its output ``[n * m, ...]``."""


class BatchedLora:
    """The layers of several adapters, which have the same rank and targets.

    Args:
        sets: the layers of each adapter by name, as :func:`~imagic_lora.adapters.lora.attached` yields them.
        scale: of the change of the output: alpha / rank.

    Attributes:
        rows: the adapter of each part of a batch, by its index; all parts have one size. One index alone holds for batches of any size.
    """

    def __init__(self, sets: Sequence[dict[str, Parameter]], scale: float) -> None:
        self.sets, self.scale = sets, scale
        self.rows: Sequence[int] = ()

    @contextmanager
    def using(self, rows: Sequence[int]) -> Iterator[None]:
        """Uses the adapters with these indices while the context is open, one for each part of a batch."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def rows_of(self, size: int) -> Sequence[int]:
        """The adapter of each part of a batch of this size.

        Raises:
            ValueError: the parts cannot have one size.
        """
        if not self.rows or size % len(self.rows):
            raise ValueError(f"a batch of {size} in {len(self.rows)} equal parts")
        return self.rows

    def matrices(self, name: str, rows: Sequence[int]) -> Tensor:
        """The matrix of this name of each of these adapters, ``[n, ...]``. Gradients flow to those of each."""
        return torch.stack([self.sets[row][name] for row in rows])


@contextmanager
def batched(base: Base, config: TuneConfig, seeds: Sequence[int]) -> Iterator[BatchedLora]:
    """Adds new LoRA layers of several adapters to the denoiser while the context is open. Afterwards it is bit-equal to before.

    No weight of the base is touched: what the layers add is added to the output of the layers that they adapt. It is the same as that of
    the layers of PEFT, up to rounding.

    Args:
        config: rank, alpha and target layers of all adapters.
        seeds: the seed of each adapter's initial weights, which are those that PEFT gives for that seed.

    Yields:
        The layers. The trainable parameters of each adapter are in fp32 regardless of the base's precision.
    """
    lora = BatchedLora(new_layers(base, config, seeds), scale_of(config))
    with added(base, lora):
        yield lora


def scale_of(config: TuneConfig) -> float:
    """The scale of what LoRA layers add: alpha / rank."""
    return 1.0 if config.alpha is None else config.alpha / config.rank


def new_layers(base: Base, config: TuneConfig, seeds: Sequence[int]) -> list[dict[str, Parameter]]:
    """Returns new layers for each seed by name, as PEFT initialises them."""
    sets: list[dict[str, Parameter]] = []
    for seed in seeds:
        with attached(base, config, seed) as layers:
            sets.append({name: Parameter(layer.detach().clone()) for name, layer in layers.items()})
    return sets


@contextmanager
def added(base: Base, lora: BatchedLora) -> Iterator[None]:
    """Adds layers to the denoiser while the context is open. Afterwards it is bit-equal to before."""
    hooks: list[Any] = []
    modules: dict[str, Any] = dict(base.denoiser.named_modules())

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    with altered(base, undo):
        for down in (name for name in lora.sets[0] if ".lora_A." in name):
            layer = modules[down.partition(".lora_A.")[0]]
            hooks.append(layer.register_forward_hook(_adding(lora, down, down.replace(".lora_A.", ".lora_B."), _delta_of(layer))))
        yield


def copy_into(layers: dict[str, Parameter], trained: dict[str, Parameter]) -> None:
    """Copies trained layers into those that :func:`~imagic_lora.adapters.lora.attached` yields, for their preview and their file."""
    with torch.no_grad():
        for name, layer in layers.items():
            layer.copy_(trained[name])


def _adding(lora: BatchedLora, down: str, up: str, delta: Delta) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """The forward hook of a layer; ``down`` and ``up`` are the names of its matrices."""

    def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, rows = inputs[0], lora.rows_of(len(inputs[0]))
        a, b = lora.matrices(down, rows), lora.matrices(up, rows)
        change = delta(x.to(a.dtype).unflatten(0, (len(rows), -1)), a, b)
        return (output + change * lora.scale).to(output.dtype)

    return hook


def _delta_of(layer: Linear | Conv2d) -> Delta:
    """The function that computes what LoRA adds to the output of a layer.

    Raises:
        ImagicError: the layer is a convolution with dilation, groups, or padding that is not of zeros.
    """
    if isinstance(layer, Linear):  # a 4-bit layer, too
        return _linear_delta
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain:
        got = f"a convolution with dilation {layer.dilation}, {layer.groups} groups and {layer.padding_mode} padding"
        raise ImagicError(got, "plain convolutions, for fits that share the calls of the denoiser", "fit one photo at a time")
    kernel, stride = layer.kernel_size, layer.stride
    padding: tuple[int, int] = layer.padding  # pyright: ignore[reportAssignmentType]  # no string, by the check
    mirrored = kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1]

    def delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """A convolution by ``a`` and a matrix ``b``. A matrix product gives, at every pixel, what it adds to each pixel around it; ``fold``
        sums these. With a low rank this needs less time and memory than unfolding the input, or than a convolution of many groups."""
        height, width = x.shape[-2:]
        size = height + 2 * padding[0] - kernel[0] + 1, width + 2 * padding[1] - kernel[1] + 1
        taps = a.flip(3, 4).flatten(3).transpose(2, 3).flatten(1, 2)  # [n, rank * kernel, in], with the kernel mirrored
        added = (taps[:, None] @ x.flatten(3)).flatten(0, 1)
        inner = F.fold(added, size, kernel, padding=mirrored)
        inner = inner[..., :: stride[0], :: stride[1]]
        shape = inner.shape[-2:]
        return (b.flatten(2)[:, None] @ inner.unflatten(0, (len(a), -1)).flatten(3)).unflatten(3, shape).flatten(0, 1)

    return delta


def _linear_delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows = x.flatten(1, -2)
    return torch.bmm(torch.bmm(rows, a.mT), b.mT).unflatten(1, x.shape[1:-1]).flatten(0, 1)
