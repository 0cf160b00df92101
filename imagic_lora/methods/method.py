"""The interface of a method: a photo, a target prompt and a seed in, edited images and their cost out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from PIL import Image

from ..bases.base import Base


@dataclass(frozen=True)
class Cost:
    """The cost of an edited image, training included.

    Args:
        forward: number of forward passes of one sample through the denoiser. Classifier-free guidance takes two passes.
        backward: number of backward passes of one sample through the denoiser.
        seconds: wall-clock time in seconds.
        adapter: size of the stored adapter in bytes; 0 without an adapter.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    adapter: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class EditResult:
    """An edited image of a method.

    Args:
        row: name of the table row that reports the image. A method may have several rows, each with its own settings.
        image: the edited image, RGB.
        cost: the cost of the image.
    """

    row: str
    image: Image.Image
    cost: Cost


@dataclass(frozen=True)
class EditRequest:
    """The input of a method.

    Args:
        photo: the source image, RGB.
        target_prompt: prompt that describes the edited image.
        seed: seed of every random number of the method.
        truth: the true edit, RGB. Only :class:`~imagic_lora.methods.bounds.Bounds` may use it.
    """

    photo: Image.Image
    target_prompt: str
    seed: int
    truth: Image.Image


@dataclass(frozen=True)
class Context:
    """What all methods of a run share.

    Args:
        base: the loaded base, frozen.
    """

    base: Base


class Method(ABC):
    """A method of editing a photo.

    Attributes:
        name: name of the method on the command line.
        rows: names of the table rows that report its images.
        settings: everything that its images depend on besides the request and the base, as JSON values.
    """

    name: str
    rows: tuple[str, ...]
    settings: dict[str, Any]

    @abstractmethod
    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        """Edits the photo of a request.

        The base is bit-equal to its former state when the iterator ends, is closed, or raises.

        Args:
            context: what all methods of a run share.
            request: the photo, the target prompt and the seed.

        Yields:
            One result for each row, in the order of :attr:`rows`.
        """


class CostMeter:
    """Counts the passes through a denoiser, and the time, since its construction."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.start = time.perf_counter()

    def cost(self, adapter: int = 0) -> Cost:
        """Returns the cost so far.

        Args:
            adapter: size of the stored adapter in bytes.
        """
        return Cost(self.forward, self.backward, time.perf_counter() - self.start, adapter)


@contextmanager
def metered(base: Base) -> Iterator[CostMeter]:
    """Counts the passes through the denoiser of a base inside a ``with`` block.

    Every sample of a batch counts as one forward pass. Where gradients are enabled it also counts as one backward pass.

    Args:
        base: the base whose denoiser is counted.

    Yields:
        The meter.
    """
    meter = CostMeter()

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        meter.forward += len(inputs[0])
        meter.backward += len(inputs[0]) * torch.is_grad_enabled()

    hook = base.denoiser.register_forward_hook(count)
    try:
        yield meter
    finally:
        hook.remove()
