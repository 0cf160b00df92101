"""Methods that only sample: the frozen base, an encoded request, and settings of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config_group import Config
from ..photos.canvas import Canvas, to_canvas, to_image
from ..sampling.checks import check_pixels
from ..sampling.trajectory import Trajectory
from .masks import canvas_mask, latent_mask
from .method import Context, EditRequest, EditResult, Load, Method, Passes, metered


class SamplingConfig(Config):
    """The settings that every method has that only samples."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Number of sampling steps from noise to the image."""
    guidance_scale: float = Field(default=7.5, ge=1, le=50)
    """Scale of classifier-free guidance: a higher value follows the target prompt more closely. 1 turns it off."""


@dataclass(frozen=True)
class EncodedRequest:
    """A request in the latent space of a base.

    Args:
        base: the base.
        request: the request.
        completed: adds the added conditions to the conditioning of a prompt.
        canvas: the photo at the resolution of the base.
        clean: latents of the photo, ``[1, C, h, w]``, the mode of the VAE.
        target: conditioning of the target prompt, with added conditions.
        source: conditioning of the source prompt, or None if the request has none.
        null: unconditional conditioning, or None for a base that has none.
    """

    base: Base
    request: EditRequest
    completed: Callable[[Conditioning], Conditioning]
    canvas: Canvas
    clean: Tensor
    target: Conditioning
    source: Conditioning | None
    null: Conditioning | None

    def encode_prompt(self, prompt: str) -> Conditioning:
        """Encodes one more prompt, with added conditions."""
        return self.completed(self.base.encode_prompt(prompt))

    def noise(self, count: int = 1) -> Tensor:
        """Draws standard normal noise with the seed of the request, on the CPU: the same numbers on every device.

        Args:
            count: number of draws.

        Returns:
            Noise ``[count, C, h, w]``; the first draws do not depend on ``count``.
        """
        generator = torch.Generator().manual_seed(self.request.seed)
        return torch.randn(count, *self.clean.shape[1:], generator=generator).to(self.clean)

    def image(self, latents: Tensor) -> Image.Image:
        """Decodes latents ``[1, C, h, w]`` to an image of the size of the photo.

        Raises:
            ImagicError: the image holds NaN.
        """
        (pixels,) = self.base.decode(latents)
        check_pixels(pixels)
        return self.canvas.restored(to_image(pixels))


def encode_request(base: Base, request: EditRequest, guidance_scale: float) -> EncodedRequest:
    """Encodes the photo and the prompts of a request, then offloads the encoders as the runtime says.

    Args:
        base: the base.
        request: the request.
        guidance_scale: scale that images are sampled with; an input of the denoiser of some bases.
    """
    canvas = to_canvas(request.photo, base.resolution, base.size_multiple)
    target = base.encode_prompt(request.target_prompt)
    source = None if request.source_prompt is None else base.encode_prompt(request.source_prompt)
    null = base.null()
    clean = base.encode_image(canvas.pixels)
    masked = _masked_photo(base, canvas, request.mask) if base.architecture.inpaints and request.mask is not None else None
    base.offload_encoders()
    complete = partial(_completed, base, canvas, guidance_scale, masked)
    source, null = (None if one is None else complete(one) for one in (source, null))
    return EncodedRequest(base, request, complete, canvas, clean, complete(target), source, null)


def _completed(
    base: Base, canvas: Canvas, guidance_scale: float, masked: tuple[Tensor, Tensor] | None, conditioning: Conditioning
) -> Conditioning:
    """Returns a conditioning with added conditions, such as the size of the canvas and the masked photo of an inpainting model."""
    height, width = canvas.pixels.shape[2:]
    conditioning = base.with_added_conditions(conditioning, height, width, guidance_scale)
    return conditioning if masked is None else base.with_masked_photo(conditioning, *masked)


def _masked_photo(base: Base, canvas: Canvas, mask: Image.Image) -> tuple[Tensor, Tensor]:
    """Returns the mask at the size of the latents, and the latents of the photo whose pixels inside the mask are grey."""
    pixels = canvas.pixels * (1 - canvas_mask(base.architecture, mask))
    return latent_mask(base.architecture, mask).to(base.runtime.device), base.encode_image(pixels)


C = TypeVar("C", bound=SamplingConfig)


class SamplingMethod(Method, Generic[C]):
    """A method that samples with the frozen base, with one row for each of its settings.

    Args:
        rows: settings by the name of their row. None: the default settings, in a row with the name of the method.

    Attributes:
        config_class: class of the settings, with the defaults of the method's own code.
    """

    config_class: ClassVar[type[SamplingConfig]]

    def __init__(self, rows: Mapping[str, C] | None = None) -> None:
        default: Any = self.config_class
        self.configs: dict[str, C] = {self.name: default()} if rows is None else dict(rows)
        self.rows = tuple(self.configs)
        self.settings = {row: config.model_dump(mode="json") for row, config in self.configs.items()}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        self.check(context.base, request)
        for row in self.rows:
            yield self._edited(context.base, request, row)

    @torch.no_grad()
    def _edited(self, base: Base, request: EditRequest, row: str) -> EditResult:
        config = self.configs[row]
        with metered(base) as meter:
            image, extras = self.sample(encode_request(base, request, config.guidance_scale), config)
            return EditResult(row, image, meter.cost(), extras)

    def check(self, base: Base, request: EditRequest) -> None:
        """Checks the request as :meth:`Method.check`, and the settings of every row as :meth:`check_config`."""
        super().check(base, request)
        for config in self.configs.values():
            self.check_config(base, config)

    def check_config(self, base: Base, config: C) -> None:
        """Checks that settings agree with each other and with the noise schedule of a base.

        Args:
            base: the base.
            config: settings of a row.

        Raises:
            ImagicError: they do not.
        """
        Trajectory(base, config.steps)

    def passes(self, base: Base) -> dict[str, Passes]:
        return {row: self.passes_with(base, config) for row, config in self.configs.items()}

    @abstractmethod
    def sample(self, encoded: EncodedRequest, config: C) -> tuple[Image.Image, Mapping[str, Any]]:
        """Samples the edited image. Gradients are disabled.

        Args:
            encoded: the request.
            config: settings of the row.

        Returns:
            The image at the size of the photo, and extras of the result.
        """

    @abstractmethod
    def passes_with(self, base: Base, config: C) -> Passes:
        """Predicts the passes of one row.

        Args:
            base: the base.
            config: settings of the row.
        """

    def load_with(self, base: Base, config: C) -> Load:
        """Predicts what one row holds in memory at once: by default a guided step of one image.

        Args:
            base: the base.
            config: settings of the row.
        """
        return Load(guided_passes(config.guidance_scale))


def guided_passes(scale: float) -> int:
    """Passes of a sampling step with classifier-free guidance: two, or one at scale 1."""
    return 1 if scale == 1 else 2
