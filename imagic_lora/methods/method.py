"""What a method of editing is to a benchmark: a photo, a sentence and a seed in, pictures and their price out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from PIL import Image

from ..bases.base import Base


@dataclass(frozen=True)
class Cost:
    """What a picture took.

    Args:
        forward, backward: passes of one sample through the denoiser; guidance makes two of one.
        seconds: of wall time.
        adapter: bytes that are kept of the photo.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    adapter: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class EditResult:
    """A picture that a method made.

    Args:
        row: under which the picture is reported: a method may have several, at settings of its own.
    """

    row: str
    image: Image.Image
    cost: Cost


@dataclass(frozen=True)
class EditRequest:
    """What a method is asked to do.

    Args:
        photo: RGB.
        text: what the edited photo shows.
        seed: of all that is random.
        truth: the true edit, which only a bound may look at.
    """

    photo: Image.Image
    text: str
    seed: int
    truth: Image.Image


@dataclass(frozen=True)
class Context:
    """What all methods share.

    Args:
        base: loaded, frozen.
        best: index of the best of several images for a target prompt and a photo, by a score that knows neither judge nor truth.
    """

    base: Base
    best: Callable[[Sequence[Image.Image], str, Image.Image], int]


class Method(ABC):
    """A way to edit.

    Args:
        name: on the command line.
        rows: under which its pictures are reported.
        settings: all that its pictures depend on besides the task and the base, as JSON.
    """

    name: str
    rows: tuple[str, ...]
    settings: dict[str, Any]

    @abstractmethod
    def pictures(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        """One picture for each row; the base is left as it was found."""


class CostMeter:
    """Counts passes through a denoiser, and time, since it was made."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.start = time.perf_counter()

    def cost(self, adapter: int = 0) -> Cost:
        """What there was so far."""
        return Cost(self.forward, self.backward, time.perf_counter() - self.start, adapter)


@contextmanager
def metered(base: Base) -> Iterator[CostMeter]:
    """A meter on a base's denoiser: every sample of a batch counts, and counts once more where there will be a backward pass."""
    meter = CostMeter()

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        meter.forward += len(inputs[0])
        meter.backward += len(inputs[0]) * torch.is_grad_enabled()

    hook = base.denoiser.register_forward_hook(count)
    try:
        yield meter
    finally:
        hook.remove()
