"""The protocol that every model family implements. Code above this package uses only this protocol and never asks for the family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.config import Scheduler
from ..core.errors import ImagicError
from ..core.runtime import Runtime
from .architecture import Architecture
from .process import Process
from .tokens import Token, VectorMasks

if TYPE_CHECKING:
    from .altered import Alteration

PipelineKind = Literal["text2image", "image2image", "inpaint"]
REFERENCE = "reference"
"""Added condition of a base that takes a reference image: its latents, ``[1, C, h, w]``."""


class Base(ABC):
    """A loaded, frozen text-to-image latent diffusion model.

    Notation of the docstrings: ``B`` is the batch size, ``T`` the number of tokens of a prompt, ``D`` the channels of a token, ``P`` the
    channels of the pooled embedding, ``C`` the latent channels, ``H`` and ``W`` the height and width of an image in pixels (multiples of
    :attr:`size_multiple`), ``h`` and ``w`` those of its latents: ``H`` and ``W`` divided by the downsampling factor of the VAE.

    Args:
        name: name of the base as the user gave it (a known name or a hub id), or the absolute path of a folder or file.
        revision: branch, tag or commit of a hub id; None for the default branch, a folder or a file.
        fingerprint: hash of the weights and the prediction type. It is equal for the same weights in fp16, in fp32 and in a single file.
        runtime: device, precision and memory levers.
        process: the noise process that the base was trained with.
    """

    pipelines: ClassVar[dict[PipelineKind, type[DiffusionPipeline]]]
    """Pipeline classes that :meth:`pipeline` can create."""
    size_multiple: int
    """Height and width of an image must be multiples of this number of pixels."""
    resolution: int
    """Side of the square images that the base was trained on, in pixels."""
    architecture: Architecture
    """Configs of the components."""
    alteration: Alteration | None = None
    """The present change of the denoiser, which :mod:`imagic_lora.bases.altered` undoes. None: the denoiser has its own weights."""

    def __init__(self, name: str, revision: str | None, fingerprint: str, runtime: Runtime, process: Process) -> None:
        self.name, self.revision, self.fingerprint, self.runtime = name, revision, fingerprint, runtime
        self.process = process

    @property
    def component(self) -> Literal["unet", "transformer"]:
        """Name of the denoiser in a diffusers pipeline: the component that stage 2 trains."""
        return self.architecture.component

    @property
    @abstractmethod
    def denoiser(self) -> ModelMixin:
        """Denoiser module, which stage 2 trains."""

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Conditioning:
        """Encodes one prompt, without gradients.

        Warns with an ImagicWarning that contains the removed text if the prompt is longer than the text encoder's maximum length.

        Returns:
            Tokens ``[1, T, D]`` and, for families that have it, the pooled embedding ``[1, P]``; fp32, on the runtime's device. The
            result has no size ids or guidance input yet: :meth:`with_added_conditions` adds them.
        """

    @abstractmethod
    def encode_vectors(self, prompt: str, vectors: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encodes the vectors of the tokens of a prompt: what a text encoder looks up for token ids, before its first layer.

        Args:
            prompt: gives the token ids, on which the pooled embedding and the mask of the padding depend.
            vectors: vectors by text encoder, ``[1, T, D]``; gradients flow to them. None: those of the prompt.

        Returns:
            As :meth:`encode_prompt`, with the vectors.
        """

    @abstractmethod
    def vector_masks(self, prompt: str) -> dict[str, VectorMasks]:
        """Which vectors of a prompt are of its words, and which are padding, by text encoder."""

    @abstractmethod
    def tokenize(self, prompt: str) -> list[Token]:
        """Returns the tokens of a prompt in the order in which :meth:`encode_prompt` encodes them, from the start to the end token.

        Padding is left out, and so is the text that exceeds the text encoder's maximum length; the end token is always the last.
        """

    @abstractmethod
    def word_mask(self, prompt: str) -> Tensor:
        """Which tokens of :meth:`encode_prompt` are of the prompt, ``[1, T]`` bool: start and end token, if any, and words; no padding."""

    @abstractmethod
    def null(self) -> Conditioning | None:
        """Encodes the unconditional input of classifier-free guidance.

        Returns:
            A conditioning of the same shapes as :meth:`encode_prompt`, or None if the denoiser takes the guidance scale as an input and so
            needs no unconditional pass.
        """

    def with_added_conditions(self, conditioning: Conditioning, height: int, width: int, guidance_scale: float) -> Conditioning:
        """Adds the inputs of the denoiser other than the text, such as size ids, to the conditioning's ``extra``.

        Args:
            conditioning: of one prompt, ``B = 1``.
            height, width: of the image in pixels.
            guidance_scale: scale that images are sampled with. Only families whose denoiser takes it as an input use it.

        Returns:
            A conditioning with the same tokens and pooled embedding. ``extra`` is unchanged for families without added conditions.
        """
        return conditioning

    def with_masked_photo(self, conditioning: Conditioning, mask: Tensor, masked: Tensor) -> Conditioning:
        """Adds what an inpainting model sees of the photo to the conditioning's ``extra``.

        Args:
            conditioning: of one prompt, ``B = 1``.
            mask: ``[1, 1, h, w]``: 1 is to be filled, 0 is kept.
            masked: latents of the photo, whose pixels inside the mask are grey, ``[1, C, h, w]``.

        Raises:
            ImagicError: the base is no inpainting model.
        """
        expected = "an inpainting model, whose U-Net takes the mask and the masked photo"
        raise ImagicError(f"a mask for the denoiser of {self.name}", expected, "choose an inpainting base, or method blended-latent")

    def with_reference(self, conditioning: Conditioning, latents: Tensor) -> Conditioning:
        """Adds a reference image, which the denoiser sees without noise in addition to its own, to the conditioning's ``extra``.

        Args:
            conditioning: of one prompt, ``B = 1``.
            latents: of the image, by :meth:`encode_image`, ``[1, C, h, w]`` of any size.

        Raises:
            ImagicError: as :meth:`check_reference`.
        """
        self.check_reference()
        return replace(conditioning, extra={**conditioning.extra, REFERENCE: latents})

    def check_reference(self) -> None:
        """Checks that the denoiser takes a reference image.

        Raises:
            ImagicError: it does not (:attr:`~imagic_lora.bases.architecture.Architecture.takes_reference`).
        """
        if not self.architecture.takes_reference:
            expected = "a base whose denoiser takes a reference image, such as FLUX.2 klein"
            raise ImagicError(f"--reference on {self.name}", expected, "leave out --reference, or choose another base")

    def pipeline_kwargs(self, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        """Keyword arguments that pass a conditioning to a diffusers pipeline of this family.

        Args:
            conditioning: with added conditions, ``B = 1``.
            null: unconditional conditioning of the same shapes, or None to sample without classifier-free guidance.

        Raises:
            ImagicError: diffusers has no pipeline of this family.
        """
        raise self._no_scheduler()

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Encodes an image to latents, without gradients: the mode of the VAE's posterior times its scaling factor.

        Args:
            image: ``[B, 3, H, W]`` in [-1, 1].

        Returns:
            Latents ``[B, C, h, w]`` in fp32 on the runtime's device.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to an image, without gradients.

        Args:
            latents: ``[B, C, h, w]``, scaled as :meth:`encode_image` returns them.

        Returns:
            Image ``[B, 3, H, W]`` in fp32, about [-1, 1], not clamped.
        """

    @abstractmethod
    def offload_encoders(self) -> None:
        """Moves text encoders and VAE off the device as ``runtime.memory.idle`` says, and the denoiser onto it.

        ``keep`` leaves them on the device, ``offload`` moves them to the CPU, ``release`` frees them. The next method that needs one moves
        it back or reads it again.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Runs the denoiser.

        Args:
            x_t: noisy latents ``[B, C, h, w]``.
            timesteps: ``[B]``, as :meth:`timesteps` returns them: in [0, ``num_train_timesteps``), or sigma in (0, 1] for a flow.
            conditioning: with added conditions, of batch size ``B``, or 1, which is broadcast.

        Returns:
            Prediction ``[B, C, h, w]`` of the quantity that :attr:`prediction_type` names, in the precision of the denoiser's computation.
            That of a flow is the velocity ``noise - x_0``, whatever packing, time scale and sign the denoiser has.
        """

    def lora_targets(self, preset: str) -> list[str]:
        """Suffixes of the names of the layers that LoRA adapts.

        Args:
            preset: ``attention`` (attention projections), ``attention+conv`` (also the convolutions of residual blocks), ``attention+mlp``
                (also the feed-forward layers of a transformer), or ``all`` (every linear and convolutional layer).

        Raises:
            ImagicError: the denoiser has no such layers.
        """
        presets = self.architecture.lora_targets
        if preset not in presets:
            got = f"--targets {preset} on {self.name}, whose denoiser is a {'transformer' if self.component == 'transformer' else 'U-Net'}"
            raise ImagicError(got, f"one of {', '.join(presets)}", "change --targets")
        return list(presets[preset])

    def scheduler(self, scheduler_class: type | None = None) -> Any:
        """Creates a sampling scheduler with the noise schedule of the base.

        Args:
            scheduler_class: class of diffusers. None: a copy of the base's own scheduler.

        Raises:
            ImagicError: the base is a flow: it is sampled by :mod:`imagic_lora.sampling.flow`, not by diffusers' schedulers.
        """
        raise self._no_scheduler()

    def sampler(self, name: Scheduler, karras_sigmas: bool) -> Any:
        """Creates the sampling scheduler that a setting names.

        Args:
            name: ``base`` is the class of the base's own scheduler.
            karras_sigmas: whether the noise levels are spaced as in arXiv 2206.00364, equation 5.

        Raises:
            ImagicError: the scheduler has no such spacing; as :meth:`scheduler`.
        """
        raise self._no_scheduler()

    def pipeline(self, kind: PipelineKind, scheduler_class: type | None = None) -> DiffusionPipeline:
        """Creates a diffusers pipeline that shares the components in memory and has its own scheduler.

        The pipeline has no text encoders. Call it with the arguments of :meth:`pipeline_kwargs`.

        Args:
            kind: selects the pipeline's class. A flow has ``text2image`` only.
            scheduler_class: as for :meth:`scheduler`. The pipeline corrects the scheduler's config as it does when it is loaded.

        Raises:
            ImagicError: the base has no pipeline of this kind; a flow with another scheduler, as :meth:`scheduler`.
        """
        raise self._no_scheduler()

    def _no_scheduler(self) -> ImagicError:
        """The error for what only a diffusion process has."""
        expected = "a base with the noise process of diffusion, such as Stable Diffusion 1, 2 or XL"
        return ImagicError(f"a sampling scheduler of diffusers on {self.name}, a flow", expected, "choose another base or another method")

    @property
    def prediction_type(self) -> str:
        """Quantity that the denoiser predicts, see :attr:`~imagic_lora.bases.process.Process.prediction_type`."""
        return self.process.prediction_type

    def timesteps(self, times: Tensor) -> Tensor:
        """Converts times ``u`` in [0, 1), ``[B]``, to timesteps: :meth:`~imagic_lora.bases.process.Process.timesteps`."""
        return self.process.timesteps(times)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Adds noise: :meth:`~imagic_lora.bases.process.Process.noised`."""
        return self.process.noised(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training target of the denoiser: :meth:`~imagic_lora.bases.process.Process.target`."""
        return self.process.target(clean, noise, timesteps)
