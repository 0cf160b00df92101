"""The common form of methods that walk the levels of a flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic

from PIL import Image
from torch import Tensor

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...sampling.flow import velocity
from ...sampling.flow_trajectory import FlowTrajectory
from ...sampling.trajectory import Predict
from ..method import Load
from ..sampled import C, EncodedRequest, SamplingMethod


class FlowMethod(SamplingMethod[C], Generic[C]):
    """A method that walks the levels of a flow with classifier-free guidance."""

    supports = frozenset({"transformer"})
    needs_null = True

    def sample(self, encoded: EncodedRequest, config: C) -> tuple[Image.Image, Mapping[str, Any]]:
        height, width = encoded.clean.shape[2:]
        trajectory = FlowTrajectory(encoded.base, config.steps, height * width)
        return encoded.image(self.edited(encoded, config, trajectory)), {}

    @abstractmethod
    def edited(self, encoded: EncodedRequest, config: C, trajectory: FlowTrajectory) -> Tensor:
        """Returns the clean latents of the edit, ``[1, C, h, w]``.

        Args:
            encoded: the request.
            config: settings of the row.
            trajectory: the levels.
        """

    def check_config(self, base: Base, config: C) -> None:
        """Does nothing: a flow has levels for every number of steps."""

    def load_with(self, base: Base, config: C) -> Load:
        return Load(1)  # the null conditioning is a pass of its own


def guided_velocity(encoded: EncodedRequest, conditioning: Conditioning, scale: float) -> Predict:
    """Returns the prediction of a step: the velocity at a conditioning, guided away from the empty prompt unless the scale is 1."""
    null = None if scale == 1 else encoded.null
    return lambda latents, step: velocity(encoded.base, latents, step.timestep, conditioning, null, scale)
