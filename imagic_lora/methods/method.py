"""The interface of a method: a request in, edited images and their cost out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image

from ..bases.altered import check_unaltered
from ..bases.architecture import Architecture
from ..bases.base import Base
from ..core.errors import ImagicError
from ..sampling.checks import check_prompt, check_seed
from .masks import check_area

Need = Literal["source_prompt", "mask", "subject"]
"""Optional fields of a request that a method may require."""

NEEDS: dict[Need, tuple[str, str]] = {
    "source_prompt": ("a prompt that describes the photo as it is", "give a source prompt, or choose another method"),
    "mask": ("a mask of the area that may change", "give a mask, or choose another method"),
    "subject": ("a noun that names the subject of the photo", "give a subject, or choose another method"),
}
"""What each need is, and what to do without it."""


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

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Passes(NamedTuple):
    """Passes of one sample through the denoiser, predicted before a method runs; counted as in :class:`Cost`.

    Args:
        forward: number of forward passes.
        backward: number of backward passes.
        at_most: whether the method may stop earlier, so that the numbers are upper bounds.
    """

    forward: int
    backward: int = 0
    at_most: bool = False


class Load(NamedTuple):
    """What a method holds in memory at once besides the weights, for the prediction of its peak.

    Args:
        samples: largest number of samples in one call of the denoiser without gradients.
        gradients: whether one sample is passed with gradients to an embedding.
        maps: bytes of attention probabilities that exist at a time.
    """

    samples: int
    gradients: bool = False
    maps: int = 0


@dataclass(frozen=True)
class EditResult:
    """An edited image of a method.

    Args:
        row: name of the row that reports the image. A method may have several rows, each with its own settings.
        image: the edited image, RGB, of the size of the photo.
        cost: the cost of the image.
        extras: what else the method found, by name: images and JSON values.
    """

    row: str
    image: Image.Image
    cost: Cost
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EditRequest:
    """The input of a method.

    Args:
        photo: the source image, RGB.
        target_prompt: prompt that describes the edited image.
        source_prompt: prompt that describes the photo.
        mask: the area that may change, mode L, of the size of the photo; 255 may change, 0 may not.
        subject: noun that names the subject of the photo.
        seed: seed of every random number of the method, in [0, 2^32).
    """

    photo: Image.Image
    target_prompt: str
    source_prompt: str | None = None
    mask: Image.Image | None = None
    subject: str | None = None
    seed: int = 0


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
        rows: names of the rows that report its images.
        settings: everything that its images depend on besides the request and the base, as JSON values.
        requires: optional fields of a request that the method cannot do without.
        supports: denoisers that the method works with: ``unet``, ``transformer``, ``inpainting U-Net``.
        needs_null: whether the method needs classifier-free guidance, which bases with the guidance scale as an input do not have.
    """

    name: str
    rows: tuple[str, ...]
    settings: dict[str, Any]
    requires: ClassVar[frozenset[Need]] = frozenset()
    supports: ClassVar[frozenset[str]] = frozenset({"unet"})
    needs_null: ClassVar[bool] = False

    @abstractmethod
    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        """Edits the photo of a request.

        The base is bit-equal to its former state when the iterator ends, is closed, or raises.

        Args:
            context: what all methods of a run share.
            request: the photo, the prompts and the seed.

        Yields:
            One result for each row, in the order of :attr:`rows`.

        Raises:
            ImagicError: as :meth:`check`, before anything is computed.
        """

    @abstractmethod
    def passes(self, base: Base) -> dict[str, Passes]:
        """Predicts the passes through the denoiser for each row, without running it.

        Args:
            base: the base that the method would run on.
        """

    def once(self, base: Base, request: EditRequest) -> int:
        """Predicts the forward passes for what is made once and kept for later edits, which :class:`Cost` does not count.

        Args:
            base: the base that the method would run on.
            request: the request.
        """
        return 0

    def check(self, base: Base, request: EditRequest) -> None:
        """Checks that the method can edit the photo of a request on a base.

        Raises:
            ImagicError: the base is not supported or has an adapter applied, a required field is missing, a prompt is empty or not UTF-8,
                the seed is out of range, or the mask does not have the size of the photo or is too small.
        """
        self.check_base(self.name, base.architecture, base.name)
        check_unaltered(base)
        for need in sorted(self.requires):
            if getattr(request, need) is None:
                raise ImagicError(f"method {self.name} without a {need.replace('_', ' ')}", *NEEDS[need])
        for prompt in (request.target_prompt, request.source_prompt):
            if prompt is not None:
                check_prompt(prompt)
        check_seed(request.seed)
        if request.mask is not None and request.mask.size != request.photo.size:
            got, size = "a mask of {} x {} pixels".format(*request.mask.size), "{} x {}, the size of the photo".format(*request.photo.size)
            raise ImagicError(got, size, "scale the mask")
        if request.mask is not None and "mask" in self.requires:
            check_area(base.architecture, request.mask)

    @classmethod
    def check_base(cls, name: str, architecture: Architecture, base: str) -> None:
        """Checks that the method can work on a base, before it is loaded.

        Args:
            name: name of the method, for the message.
            architecture: configs of the base.
            base: name of the base, for the message.

        Raises:
            ImagicError: the denoiser is of another kind.
        """
        kind = "inpainting U-Net" if architecture.inpaints else architecture.component
        if kind in cls.supports and (architecture.guidance == "cfg" or not cls.needs_null):
            return
        kind = f"{_with_article(kind)}" + (" that takes the guidance scale as an input" if architecture.guidance == "embedded" else "")
        expected = " or ".join(sorted(cls.supports)) + (" with classifier-free guidance" if cls.needs_null else "")
        remedy = "choose another base or another method"
        if architecture.inpaints:
            remedy = "choose method inpaint, or the base that this one was made from"
        elif "inpainting U-Net" in cls.supports:
            remedy = "choose an inpainting base, or method blended-latent, which edits inside a mask with any base"
        raise ImagicError(f"method {name} on {base}, {kind}", _with_article(expected), remedy)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun.startswith("i") else f"a {noun}"


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
