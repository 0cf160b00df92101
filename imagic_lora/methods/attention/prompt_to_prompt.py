"""Prompt-to-Prompt (arXiv 2208.01626) on photos and on generated images, and direct inversion (arXiv 2310.01506)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

from PIL import Image
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from ...bases.base import Base
from ...sampling.attention import map_bytes
from ...sampling.trajectory import Trajectory
from ..inversions.ddim import DDIMInversion
from ..inversions.edit_friendly import EditFriendly
from ..inversions.inverted import Inverted, InvertingMethod, null_of
from ..inversions.negative_prompt import NegativePromptInversion
from ..inversions.null_text import NullTextInversion
from ..inversions.renoise import ReNoise
from ..masks import mask_image
from ..method import EditRequest, Load, Passes
from ..sampled import EncodedRequest, SamplingConfig, SamplingMethod, guided_passes
from .branches import two_branches
from .control import ControlConfig, control

Inversion = Literal["ddim-inversion", "negative-prompt", "null-text", "renoise", "edit-friendly"]

_INVERSIONS: Mapping[str, type[InvertingMethod[Any]]] = {
    method.name: method for method in (DDIMInversion, NegativePromptInversion, NullTextInversion, ReNoise, EditFriendly)
}


class PromptToPromptConfig(ControlConfig):
    """Settings of Prompt-to-Prompt on photos, with the defaults of the official notebook for null-text inversion."""

    inversion: Inversion = "null-text"
    """Method that inverts the photo."""
    inversion_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the inversion, by name, other than steps and guidance_scale, which are those of the edit."""

    @model_validator(mode="after")
    def _has_valid_inversion(self) -> PromptToPromptConfig:
        if {"steps", "guidance_scale"} & set(self.inversion_settings):
            raise ValueError("inversion_settings without steps and guidance_scale, which are those of the edit")
        try:
            self.inversion_config()
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"])) or "all"
            raise ValueError(f"valid inversion_settings for {self.inversion} ({name}: {problem['msg']})") from error
        return self

    def inversion_config(self) -> SamplingConfig:
        """Returns the settings of the inversion."""
        settings = {"steps": self.steps, "guidance_scale": self.guidance_scale, **self.inversion_settings}
        return _INVERSIONS[self.inversion].config_class.model_validate(settings)


class DirectInversionConfig(ControlConfig):
    """Settings of direct inversion, with the defaults of the official run on PIE-Bench."""

    cross_steps: float = Field(default=0.4, ge=0, le=1)
    """Share of the steps during which cross-attention is that of the source. A lower value allows larger changes of shape."""
    self_steps: float = Field(default=0.6, ge=0, le=1)
    """Share of the steps during which self-attention is that of the source. A lower value allows larger changes of shape."""
    blend_factor: float = Field(default=2.0, ge=0, le=100)
    """Factor of the attention to the words of target_blend that have no factor of their own."""


class GeneratedConfig(ControlConfig):
    """Settings of Prompt-to-Prompt on generated images, with the defaults of the official notebook for Stable Diffusion."""

    self_steps: float = Field(default=0.4, ge=0, le=1)
    """Share of the steps during which self-attention is that of the source. A lower value allows larger changes of shape."""
    blend_start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps before the first local blend."""


K = TypeVar("K", bound=ControlConfig)


class AttentionMethod(SamplingMethod[K], Generic[K]):
    """A method that samples the source and the target side by side, the target with the attention of the source."""

    requires = frozenset({"source_prompt"})
    needs_null = True
    on_path, branches = False, 2

    @abstractmethod
    def invert(self, encoded: EncodedRequest, config: K) -> Inverted:
        """Returns what is edited: the inversion of the photo, or noise. Gradients are disabled.

        Args:
            encoded: the request.
            config: settings of the row.
        """

    def check(self, base: Base, request: EditRequest) -> None:
        """Checks the request as :meth:`Method.check`, and that the words of the settings are in its prompts.

        Raises:
            ImagicError: also as :func:`~imagic_lora.methods.attention.control.control`.
        """
        super().check(base, request)
        for config in self.configs.values():
            control(base, request, config, config.steps)

    def sample(self, encoded: EncodedRequest, config: K) -> tuple[Image.Image, Mapping[str, Any]]:
        inverted = self.invert(encoded, config)
        change = control(encoded.base, encoded.request, config, config.steps - inverted.start)
        latents = two_branches(inverted, encoded.target, config.guidance_scale, change, self.on_path)
        extras = {"blend": mask_image(encoded.canvas, change.blend.mask(latents))} if change.blend else {}
        return encoded.image(latents[1:]), extras | self.extras(encoded, latents[:1])

    def extras(self, encoded: EncodedRequest, source: Tensor) -> dict[str, Any]:
        """Returns extras of the result.

        Args:
            encoded: the request.
            source: clean latents of the source, ``[1, C, h, w]``.
        """
        return {}

    def load_with(self, base: Base, config: K) -> Load:
        samples = self.branches * guided_passes(config.guidance_scale) - (self.on_path and config.guidance_scale != 1)
        return Load(samples, maps=map_bytes(base, samples, config.self_size**2))


class PromptToPrompt(AttentionMethod[PromptToPromptConfig]):
    """Prompt-to-Prompt (arXiv 2208.01626) on a photo: the target prompt with the attention maps of the inverted photo.

    Source and target are sampled side by side from the inverted photo. In the first steps the target takes the cross-attention of the
    words that both prompts share, and the self-attention of coarse layers; so it keeps the layout of the photo. Words can be reweighted,
    and the edit can be limited to the area of some words. Everywhere but in the layers that are changed, attention is the base's own.
    """

    name, config_class = "prompt-to-prompt", PromptToPromptConfig

    def invert(self, encoded: EncodedRequest, config: PromptToPromptConfig) -> Inverted:
        return _INVERSIONS[config.inversion]().invert(encoded, config.inversion_config())

    def check_config(self, base: Base, config: PromptToPromptConfig) -> None:
        _INVERSIONS[config.inversion]().check_config(base, config.inversion_config())

    def passes_with(self, base: Base, config: PromptToPromptConfig) -> Passes:
        inversion = config.inversion_config()
        passes = _INVERSIONS[config.inversion]().passes_with(base, inversion)
        sampled = (config.steps - getattr(inversion, "skip", 0)) * guided_passes(config.guidance_scale)
        return passes._replace(forward=passes.forward + sampled)  # the inverting method samples one branch, here there are two

    def load_with(self, base: Base, config: PromptToPromptConfig) -> Load:
        inverting = _INVERSIONS[config.inversion]().load_with(base, config.inversion_config())
        return super().load_with(base, config)._replace(gradients=inverting.gradients)


class DirectInversion(AttentionMethod[DirectInversionConfig]):
    """Direct inversion, or PnP inversion (arXiv 2310.01506), with Prompt-to-Prompt: the source is put back on the inverted path.

    The pivot is DDIM inversion with the source prompt. After each step the latents of the source are replaced by those of the pivot, so
    that the target takes the attention of the photo itself. Without a change of attention this is DDIM inversion.
    """

    name, config_class, on_path = "direct-inversion", DirectInversionConfig, True

    def invert(self, encoded: EncodedRequest, config: DirectInversionConfig) -> Inverted:
        return DDIMInversion().invert(encoded, SamplingConfig(steps=config.steps))

    def passes_with(self, base: Base, config: DirectInversionConfig) -> Passes:
        return Passes(config.steps * (2 + guided_passes(config.guidance_scale)))


class PromptToPromptText(AttentionMethod[GeneratedConfig]):
    """Prompt-to-Prompt on a generated image: the source is sampled from noise with the source prompt. The photo gives only the size.

    The extras of the result hold the source image.
    """

    name, config_class = "prompt-to-prompt-text", GeneratedConfig

    def invert(self, encoded: EncodedRequest, config: GeneratedConfig) -> Inverted:
        assert encoded.source is not None
        trajectory, sources, nulls = (
            Trajectory(encoded.base, config.steps),
            [encoded.source] * config.steps,
            [null_of(encoded)] * config.steps,
        )
        return Inverted(encoded.base, trajectory, {0: encoded.noise()}, sources, nulls)

    def extras(self, encoded: EncodedRequest, source: Tensor) -> dict[str, Any]:
        return {"source": encoded.image(source)}

    def passes_with(self, base: Base, config: GeneratedConfig) -> Passes:
        return Passes(2 * config.steps * guided_passes(config.guidance_scale))
