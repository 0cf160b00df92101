"""SDEdit: image to image (arXiv 2108.01073)."""

from __future__ import annotations

from pydantic import Field

from ..core.config import EditConfig
from .generated import GeneratingMethod
from .sampled import SamplingConfig


class SDEditConfig(SamplingConfig):
    """Settings of SDEdit; the defaults are those of diffusers' image-to-image pipelines."""

    strength: float = Field(default=0.8, gt=0, le=1)
    """How much noise is added to the photo, as a share of the sampling steps. 1: nothing of the photo is kept."""


class SDEdit(GeneratingMethod[SDEditConfig]):
    """SDEdit (arXiv 2108.01073) in latent space: the photo is noised to a level and sampled from there with the target prompt.

    This is text-guided image to image: one noise, one pass over the levels, deterministic steps. The paper edits strokes in pixel space,
    with stochastic steps, and repeats them.
    """

    name, config_class = "sdedit", SDEditConfig

    def edit_config(self, config: SDEditConfig) -> EditConfig:
        return EditConfig(steps=config.steps, guidance_scale=config.guidance_scale, start="image", strength=config.strength)
