"""DDIM inversion (arXiv 2010.02502, section 4.3), and DDIB (arXiv 2203.08382)."""

from __future__ import annotations

from pydantic import Field

from ...bases.base import Base
from ...sampling.trajectory import Path, Trajectory, guided, path
from ..method import Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .inverted import Inverted, InvertingMethod, null_of, source_or_null


class DDIMInversion(InvertingMethod[SamplingConfig]):
    """DDIM run backwards from the photo, without guidance, then forwards with the target prompt (arXiv 2010.02502, section 4.3).

    The photo is inverted with the source prompt, or with the empty prompt if there is none. Guidance in the second half makes the
    error of the inversion visible: with the source prompt the photo does not come back. The defaults are those of the code of null-text
    inversion (arXiv 2211.09794), which calls this its baseline.
    """

    name, config_class = "ddim-inversion", SamplingConfig

    def invert(self, encoded: EncodedRequest, config: SamplingConfig) -> Inverted:
        trajectory = Trajectory(encoded.base, config.steps)
        source, null = source_or_null(encoded), null_of(encoded)
        return Inverted(encoded.base, trajectory, pivot(encoded, trajectory), [source] * config.steps, [null] * config.steps)

    def passes_with(self, base: Base, config: SamplingConfig) -> Passes:
        return Passes(config.steps * (1 + guided_passes(config.guidance_scale)))


class DDIBConfig(SamplingConfig):
    """Settings of DDIB. The official code runs 1000 steps on models of 256 pixels without guidance; Imagic uses scales of 1 to 5."""

    steps: int = Field(default=250, ge=1, le=1000)
    """Number of steps of each half. The error of the cycle falls with it."""
    guidance_scale: float = Field(default=3.0, ge=1, le=50)
    """Scale of classifier-free guidance of the second half. Values above 5 break the structure of the photo."""


class DDIB(DDIMInversion):
    """Dual diffusion implicit bridges (arXiv 2203.08382): two DDIMs share one noise, the first with the source and the second with the
    target prompt.

    It differs from :class:`DDIMInversion` in its many steps, its low guidance scale, and in the source prompt that it needs.
    """

    name, config_class = "ddib", DDIBConfig
    requires = frozenset({"source_prompt"})


def pivot(encoded: EncodedRequest, trajectory: Trajectory) -> Path:
    """Returns the path of DDIM inversion at guidance scale 1 with the source prompt, or with the empty prompt if there is none.

    Args:
        encoded: the request.
        trajectory: the noise levels.

    Returns:
        Latents at all positions; the clean end is the photo.
    """
    return path(trajectory.backwards(encoded.clean, guided(encoded.base, source_or_null(encoded))))
