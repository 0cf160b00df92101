"""Methods that call stage 3 on the untuned base, and the target prompt alone as one of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic

from PIL import Image

from ..bases.base import Base
from ..core.config import EditConfig
from ..sampling.checks import check_sampling
from ..sampling.generate import generate
from .method import Passes
from .sampled import C, EncodedRequest, SamplingConfig, SamplingMethod


class GeneratingMethod(SamplingMethod[C], Generic[C]):
    """A method that generates from the target prompt with the sampling scheduler of the base. It works on every base."""

    supports = frozenset({"unet", "transformer"})

    @abstractmethod
    def edit_config(self, config: C) -> EditConfig:
        """Returns the settings of stage 3."""

    def sample(self, encoded: EncodedRequest, config: C) -> tuple[Image.Image, Mapping[str, Any]]:
        target, seeds = encoded.target, [encoded.request.seed]
        (image,) = generate(encoded.base, [target], seeds, self.edit_config(config), encoded.canvas, encoded.null, [target])
        return image, {}

    def check_config(self, base: Base, config: C) -> None:
        """Does nothing: stage 3 has its own schedulers."""

    def passes_with(self, base: Base, config: C) -> Passes:
        return generation_passes(base, self.edit_config(config))


class PromptOnly(GeneratingMethod[SamplingConfig]):
    """Samples from noise with the target prompt and does not use the photo."""

    name, config_class = "prompt-only", SamplingConfig

    def edit_config(self, config: SamplingConfig) -> EditConfig:
        return EditConfig(steps=config.steps, guidance_scale=config.guidance_scale, start="noise")


def generation_passes(base: Base, config: EditConfig) -> Passes:
    """Predicts the passes of generating one image by stage 3, an inversion of the photo included.

    Args:
        base: the base; its scheduler decides how many calls a number of steps takes.
        config: settings of stage 3.

    Raises:
        ImagicError: the strength leaves no sampling step.
    """
    guided = 2 if config.guidance_scale > 1 and base.architecture.guidance == "cfg" else 1
    if config.start == "inverted":
        return Passes(config.steps * (1 + guided))
    calls, order = config.steps, 1  # of a flow
    if base.architecture.process == "diffusion":
        scheduler = base.scheduler()
        scheduler.set_timesteps(config.steps)
        calls, order = len(scheduler.timesteps), scheduler.order
    if config.start in ("image", "flow"):
        check_sampling(config)
        calls -= (config.steps - int(config.steps * config.strength)) * order
    return Passes(calls * guided * (2 if config.start == "flow" else 1))
