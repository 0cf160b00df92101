"""MagicMix: semantic mixing (arXiv 2210.16056), of a photo or of a prompt with a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..sampling.trajectory import Trajectory, guided
from .method import Passes
from .sampled import EncodedRequest, SamplingConfig, SamplingMethod, guided_passes


class MagicMixConfig(SamplingConfig):
    """Settings of MagicMix, with the defaults of diffusers' community pipeline; the authors published no code."""

    start: float = Field(default=0.6, gt=0, le=1)
    """Noise level that sampling starts from (K_max), as a share of the sampling steps. A higher value keeps less of the layout."""
    until: float = Field(default=0.3, ge=0, le=1)
    """Noise level down to which the layout is mixed in (K_min), as a share of the sampling steps."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Weight of the content in each mix. 1: only the noise that sampling starts from has the layout, as in SDEdit. 0: only the layout
    counts until the last mix."""

    @model_validator(mode="after")
    def _in_order(self) -> MagicMixConfig:
        if self.until > self.start:
            raise ValueError(f"until at most start ({self.start:g})")
        return self


class MagicMix(SamplingMethod[MagicMixConfig]):
    """MagicMix (arXiv 2210.16056): the layout of the photo and the content of the target prompt, mixed at the middle noise levels.

    Sampling starts from the photo noised to the level K_max. From there to the level K_min, ``z <- mix z + (1 - mix) L`` before each step,
    where the layout ``L`` is the photo noised to the level of ``z``, with one noise for all levels. The target prompt names the content,
    such as "a coffee machine"; with a full description of the edited photo the method acts like SDEdit that is held back.
    """

    name, config_class, needs_null = "magicmix", MagicMixConfig, True

    def sample(self, encoded: EncodedRequest, config: MagicMixConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        return encoded.image(mixed(encoded, config, encoded.clean)), {}

    def check_config(self, base: Base, config: MagicMixConfig) -> None:
        Trajectory(base, config.steps).position(config.start)

    def passes_with(self, base: Base, config: MagicMixConfig) -> Passes:
        return Passes(int(config.steps * config.start) * guided_passes(config.guidance_scale))


class MagicMixText(MagicMix):
    """MagicMix of two prompts: the layout is an image sampled from the source prompt. The photo gives only the size."""

    name = "magicmix-text"
    requires = frozenset({"source_prompt"})

    def sample(self, encoded: EncodedRequest, config: MagicMixConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        assert encoded.source is not None
        latents = encoded.noise()
        for step in Trajectory(encoded.base, config.steps).forwards(latents, _guided(encoded, encoded.source, config)):
            latents = step.latents
        return encoded.image(mixed(encoded, config, latents)), {"layout": encoded.image(latents)}

    def passes_with(self, base: Base, config: MagicMixConfig) -> Passes:
        layout = config.steps * guided_passes(config.guidance_scale)
        return Passes(layout + super().passes_with(base, config).forward)


def mixed(encoded: EncodedRequest, config: MagicMixConfig, layout: Tensor) -> Tensor:
    """Returns the clean latents of the mix, ``[1, C, h, w]``.

    Args:
        encoded: the request.
        config: the settings.
        layout: clean latents of the layout, ``[1, C, h, w]``.

    Raises:
        ImagicError: no step lies below the noise level K_max.
    """
    trajectory, noise = Trajectory(encoded.base, config.steps), encoded.noise()
    start, last = trajectory.position(config.start), config.steps - int(config.steps * config.until)
    latents = trajectory.noised(layout, noise, start)
    for step in trajectory.forwards(latents, _guided(encoded, encoded.target, config), start):
        if step.end <= last and step.end < config.steps:
            step.latents = config.mix * step.latents + (1 - config.mix) * trajectory.noised(layout, noise, step.end)
        latents = step.latents
    return latents


def _guided(encoded: EncodedRequest, conditioning: Conditioning, config: MagicMixConfig) -> Any:
    return guided(encoded.base, conditioning, encoded.null, config.guidance_scale)
