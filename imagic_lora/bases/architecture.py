"""The configs of a base's components, and what follows from them before anything is loaded. This module does not import torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..core.config import FitMethod
from ..core.errors import ImagicError
from .layers import LORA_TARGETS, TRANSFORMER_TARGETS, klein_targets
from .loading.vetting import TIME_IDS, inpainting_channels

SD3_T5_LENGTH = 256
"""Number of T5 tokens of Stable Diffusion 3: the default of diffusers' pipeline."""
KLEIN_LENGTH = 512
"""Number of tokens of FLUX.2 klein, as in diffusers' pipeline."""
KLEIN_LAYERS = (9, 18, 27)
"""Layers of Qwen3 whose outputs are the channels of FLUX.2 klein's tokens, as in diffusers' pipeline; those above are not loaded."""

LARGE_ENCODERS = ("T5EncoderModel", "Qwen3ForCausalLM")
"""Classes of text encoders of billions of parameters: each is alone on the device while it encodes, and may be quantized."""

Guidance = Literal["cfg", "embedded", "none"]
"""How a base is guided. ``cfg``: classifier-free guidance, a second pass. ``embedded``: the scale is an input of the denoiser. ``none``."""


@dataclass(frozen=True)
class Architecture(ABC):
    """The configs of a base's components, with the keys of diffusers and transformers. Each family has a class.

    Args:
        denoiser: config of the denoiser.
        vae: config of the VAE.
        text_encoders: configs of the text encoders by component name, in the order in which they encode.
        scheduler: config of the sampling scheduler; ``_class_name`` is its class.
        empty_is_zeros: True if the unconditional embedding is zeros, False if it is the embedding of the empty prompt.
        few_steps: number of sampling steps of a distilled base; None for other bases.
    """

    denoiser: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    empty_is_zeros: bool = False
    few_steps: int | None = None

    component: ClassVar[Literal["unet", "transformer"]]
    """Name of the denoiser in a diffusers pipeline."""
    process: ClassVar[Literal["diffusion", "flow"]]
    """Noise process: :class:`~imagic_lora.bases.process.Diffusion` or :class:`~imagic_lora.bases.process.Flow`."""
    recipe: ClassVar[str]
    """Key of the learning rates and sampling settings in :data:`~imagic_lora.core.settings.recipes.RECIPES`, if the base has none of its
    own."""
    takes_reference: ClassVar[bool] = False
    """Whether the denoiser takes a reference image in addition to the noisy one."""
    encoder_classes: ClassVar[dict[str, str]]
    """Classes of transformers of the text encoders, by component name. A base may lack the optional ones."""

    @property
    @abstractmethod
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """Suffixes of the names of the layers that LoRA adapts, by preset."""

    @property
    @abstractmethod
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one conditioning with added conditions, ``B = 1``, by name; without the mask of the words."""

    @property
    def vectors(self) -> dict[str, tuple[int, int, int]]:
        """Shapes ``[1, T, D]`` of the vectors of the tokens of one prompt, by text encoder."""
        texts = self.text_encoders.items()
        return {
            name: (1, text.get("max_position_embeddings", SD3_T5_LENGTH), text["hidden_size"] if "hidden_size" in text else text["d_model"])
            for name, text in texts
        }

    @property
    @abstractmethod
    def guidance(self) -> Guidance:
        """How the base is guided."""

    @property
    @abstractmethod
    def vae_overflows_fp16(self) -> bool:
        """Whether the VAE overflows in fp16 and has to run in fp32 there."""

    @property
    def has_large_encoder(self) -> bool:
        """Whether one of the text encoders has billions of parameters."""
        return any(self.encoder_classes[name] in LARGE_ENCODERS for name in self.text_encoders)

    @property
    def vae_scale_factor(self) -> int:
        """Downsampling factor of the VAE: side of an image in pixels divided by the side of its latents."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this number of pixels: diffusers' pipelines require multiples of 8."""
        return math.lcm(8, self.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        """Channels ``C`` of the latents."""
        return self.vae["latent_channels"]

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser fills a mask: its inputs are the noisy latents, the mask, and the latents of the photo without the area."""
        return self.denoiser["in_channels"] == inpainting_channels(self.latent_channels)

    @property
    def resolution(self) -> int:
        """Side of the square images that the base was trained on, in pixels."""
        return self.denoiser["sample_size"] * self.vae_scale_factor

    def with_resolution(self, resolution: int) -> Architecture:
        """The architecture of a base that was trained on images of another size."""
        return replace(self, denoiser=self.denoiser | {"sample_size": resolution // self.vae_scale_factor})

    def check_trainable(self, name: str) -> None:
        """Checks that a fit can train the base.

        Args:
            name: of the base, for the message.

        Raises:
            ImagicError: it is an inpainting model.
        """
        check_text_to_image(self, name, "a fit")


def check_fit_method(architecture: Architecture, name: str, method: FitMethod) -> None:
    """Raises ImagicError for a flow and a method that is for U-Nets alone.

    Args:
        architecture: configs of the base.
        name: of the base, for the message.
        method: method of the fit.
    """
    if method != "imagic" and architecture.process == "flow":
        got = f"--method {method} on {name}, a flow transformer"
        raise ImagicError(got, "a base with a U-Net: Stable Diffusion 1.x, 2.x or XL, or critters", "use --method imagic, or another base")


def check_text_to_image(architecture: Architecture, name: str, what: str) -> None:
    """Raises ImagicError for an inpainting model.

    Args:
        architecture: configs of the base.
        name: name of the base, for the message.
        what: what needs a text-to-image base, for the message.
    """
    if architecture.inpaints:
        remedy = "choose the base that it was made from, or edit inside a mask: imagic-lora compare --methods inpaint --mask MASK"
        raise ImagicError(f"{what} on {name}, an inpainting model", "a text-to-image base", remedy)


@dataclass(frozen=True)
class UNetArchitecture(Architecture):
    """Stable Diffusion 1.x, 2.x and XL. A second text encoder gives the pooled embedding, an input of the U-Net."""

    component, process, recipe = "unet", "diffusion", "sd"
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        return LORA_TARGETS

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        length = self.text_encoders["text_encoder"]["max_position_embeddings"]
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, length, self.denoiser["cross_attention_dim"])}
        if second := self.text_encoders.get("text_encoder_2"):
            shapes |= {"pooled": (1, second["projection_dim"]), "time_ids": (1, TIME_IDS)}
        return shapes | ({"guidance": (1,)} if self.guidance == "embedded" else {})

    @property
    def guidance(self) -> Guidance:
        return "embedded" if self.denoiser.get("time_cond_proj_dim") else "cfg"

    @property
    def vae_overflows_fp16(self) -> bool:
        """The VAE of SDXL does, unless its config sets ``force_upcast`` to false."""
        return "text_encoder_2" in self.text_encoders and self.vae.get("force_upcast", True)


@dataclass(frozen=True)
class FlowArchitecture(Architecture):
    """A flow transformer. One that is distilled to few steps samples without guidance."""

    component, process, recipe = "transformer", "flow", "flow"

    @property
    def guidance(self) -> Guidance:
        return "none" if self.few_steps else "cfg"

    @property
    def vae_overflows_fp16(self) -> bool:
        """It does not: diffusers' pipelines of flows have no such case."""
        return False

    def check_trainable(self, name: str) -> None:
        """As there; a distilled flow is refused too: the loss of a fit has its minimum at the velocity of the many-step model."""
        super().check_trainable(name)
        if self.few_steps:
            got = f"a fit on {name}, a flow that is distilled to {self.few_steps} steps"
            expected = "a base that is not distilled: the loss of a fit undoes the distillation, and images blur"
            raise ImagicError(got, expected, "fit on the base that it was made from, and sample on this one with edit --twin")


@dataclass(frozen=True)
class SD3Architecture(FlowArchitecture):
    """Stable Diffusion 3 and 3.5. The pooled embeddings of both CLIP encoders are inputs of the transformer."""

    recipe = "sd3"
    encoder_classes: ClassVar[dict[str, str]] = {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        return TRANSFORMER_TARGETS

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        clip = self.text_encoders["text_encoder"]["max_position_embeddings"]
        tokens = (1, clip + SD3_T5_LENGTH, self.denoiser["joint_attention_dim"])
        return {"tokens": tokens, "pooled": (1, self.denoiser["pooled_projection_dim"])}


@dataclass(frozen=True)
class SD3ClipArchitecture(SD3Architecture):
    """The transformer of Stable Diffusion 3 with one CLIP text encoder, and no tokens of T5."""

    recipe = "flow"
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "CLIPTextModel"}

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        text = self.text_encoders["text_encoder"]
        return {"tokens": (1, text["max_position_embeddings"], text["hidden_size"]), "pooled": (1, text["hidden_size"])}


@dataclass(frozen=True)
class KleinArchitecture(FlowArchitecture):
    """FLUX.2 klein. Latents are those of the VAE in patches of 2 x 2: four times its channels at half its height and width.

    The config of the text encoder has the layers that are loaded, not all that the files hold.

    Args:
        side: side of the square images that the base was trained on, in pixels; no config of diffusers states it.
    """

    side: int = 1024

    recipe = "klein"
    takes_reference = True
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "Qwen3ForCausalLM"}

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        return klein_targets(self.denoiser["num_single_layers"])

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        return {"tokens": (1, KLEIN_LENGTH, self.denoiser["joint_attention_dim"])}

    @property
    def vectors(self) -> dict[str, tuple[int, int, int]]:
        return {"text_encoder": (1, KLEIN_LENGTH, self.text_encoders["text_encoder"]["hidden_size"])}

    @property
    def vae_scale_factor(self) -> int:
        return 2 * super().vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return self.denoiser["in_channels"]

    @property
    def resolution(self) -> int:
        return self.side

    def with_resolution(self, resolution: int) -> Architecture:
        return replace(self, side=resolution)
