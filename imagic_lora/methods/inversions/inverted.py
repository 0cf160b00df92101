"""What every inversion returns, and the common form of methods that invert the photo and sample with the target prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from PIL import Image
from torch import Tensor

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...sampling.trajectory import Path, Step, Trajectory, guided, last
from ..sampled import C, EncodedRequest, SamplingMethod


@dataclass(frozen=True)
class Inverted:
    """A trajectory on which the source prompt gives the photo, up to the error of the inversion.

    Args:
        base: the base.
        trajectory: the noise levels.
        path: latents of the photo ``[1, C, h, w]`` at each position from ``start`` to the clean end.
        sources: conditioning of the photo at each step, by the index of the step.
        nulls: unconditional conditioning at each step, by the index of the step.
        start: position that sampling starts from.
        added: noise that is added after each step, by the index of the step; empty for deterministic sampling.
    """

    base: Base
    trajectory: Trajectory
    path: Path
    sources: Sequence[Conditioning]
    nulls: Sequence[Conditioning]
    start: int = 0
    added: Mapping[int, Tensor] | None = None

    def sample(self, conditionings: Sequence[Conditioning], scale: float) -> Iterator[Step]:
        """Samples from the start to the clean end, with guidance.

        Args:
            conditionings: the conditioning at each step, by its index: that of the target prompt for an edit, :attr:`sources` for a
                reconstruction. With a batch size of ``B``, such as the source and the target prompt, ``B`` images are sampled from the
                same latents.
            scale: guidance scale.

        Yields:
            Each step, of ``B`` samples, the added noise included. A loop body may change its latents.
        """
        latents = self.path[self.start].expand(len(conditionings[0].tokens), -1, -1, -1)

        def predict(latents: Tensor, step: Step) -> Tensor:
            return guided(self.base, conditionings[step.index], self.nulls[step.index], scale)(latents, step)

        for step in self.trajectory.forwards(latents, predict, self.start):
            if self.added:
                step.latents = step.latents + self.added[step.index]
            yield step

    def edited(self, target: Conditioning, scale: float) -> Tensor:
        """Returns the clean latents for another prompt, ``[1, C, h, w]``.

        Args:
            target: conditioning of the prompt.
            scale: guidance scale.
        """
        return last(self.path[self.start], self.sample([target] * self.trajectory.steps, scale))

    def reconstructed(self, scale: float) -> Tensor:
        """Returns the clean latents for the source prompt, ``[1, C, h, w]``: those of the photo, up to the error of the inversion.

        Args:
            scale: guidance scale.
        """
        return last(self.path[self.start], self.sample(self.sources, scale))


def source_or_null(encoded: EncodedRequest) -> Conditioning:
    """Returns the conditioning that describes the photo: of the source prompt, or of the empty prompt if the request has none."""
    conditioning = encoded.source if encoded.source is not None else encoded.null
    assert conditioning is not None, "the method needs a null conditioning"
    return conditioning


def null_of(encoded: EncodedRequest) -> Conditioning:
    """Returns the unconditional conditioning of a request, for methods with ``needs_null``."""
    assert encoded.null is not None, "the method needs a null conditioning"
    return encoded.null


class InvertingMethod(SamplingMethod[C], Generic[C]):
    """A method that inverts the photo and samples the result with the target prompt."""

    needs_null = True

    @abstractmethod
    def invert(self, encoded: EncodedRequest, config: C) -> Inverted:
        """Inverts the photo of a request. Gradients are disabled.

        Args:
            encoded: the request.
            config: settings of the row.
        """

    def sample(self, encoded: EncodedRequest, config: C) -> tuple[Image.Image, Mapping[str, Any]]:
        latents = self.invert(encoded, config).edited(encoded.target, config.guidance_scale)
        return encoded.image(latents), {}
