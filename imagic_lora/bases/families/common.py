"""What all families share: components on their devices, the VAE, the CLIP tokenizers, and the denoiser's precision."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.errors import ImagicError, ImagicWarning
from ...core.runtime import Runtime
from ..architecture import LARGE_ENCODERS, Architecture
from ..base import Base
from ..loading import components, schedulers
from ..loading.components import tokenizer_of, vae_dtype
from ..loading.files import Files, fingerprint
from ..loading.vetting import library_errors
from ..process import Process
from ..quantization import quantize_linear
from ..tokens import Token, VectorMasks


class LatentBase(Base):
    """A base of a denoiser, a VAE and text encoders.

    Args:
        architecture: configs of the components.
        parts: the components by name: the denoiser, ``vae``, ``scheduler``, each text encoder and its tokenizer, on any device.
        name, revision, fingerprint, runtime: as in :class:`~imagic_lora.bases.base.Base`.
        reload: reads a component (the VAE or a text encoder) again after it was released. Its argument is the component's name.

    Raises:
        ImagicError: ``--attention xformers`` without a working xformers; ``--quantize-text`` without a large text encoder.
    """

    denoiser_class: ClassVar[Any]
    """Class of the denoiser in diffusers."""
    vae_class: ClassVar[Any] = AutoencoderKL
    """Class of the VAE in diffusers."""
    optional_components: ClassVar[tuple[str, ...]] = ()
    """Components of the pipeline that a base may lack."""
    unused_components: ClassVar[dict[str, Any]] = {}
    """Optional arguments of the pipeline classes, set so that the pipelines have none of these components."""

    def __init__(
        self,
        architecture: Architecture,
        parts: dict[str, Any],
        name: str,
        revision: str | None,
        fingerprint: str,
        runtime: Runtime,
        reload: Callable[[str], Any],
    ) -> None:
        super().__init__(name, revision, fingerprint, runtime, self.process_of(architecture, parts["scheduler"]))
        self.architecture = architecture
        self._denoiser, self._scheduler = parts[architecture.component], parts["scheduler"]
        self._tokenizers = {tokenizer_of(encoder): parts[tokenizer_of(encoder)] for encoder in architecture.text_encoders}
        self._helpers: dict[str, Any] = {helper: parts[helper] for helper in ("vae", *architecture.text_encoders)}
        self._reload = reload
        self._half_moved: WeakSet[Any] = WeakSet()  # modules whose move was interrupted: some of their tensors are elsewhere
        self.size_multiple = architecture.size_multiple
        self.resolution = architecture.resolution
        self._denoiser.requires_grad_(False).eval()
        if runtime.memory.quantize_text == "nf4" and not any(kind in LARGE_ENCODERS for kind in self._kinds()):
            got = f"--quantize-text nf4 with {name}, whose text encoder is CLIP"
            raise ImagicError(got, "a base with T5 or Qwen3", "leave out --quantize-text: CLIP is small")
        if runtime.memory.quantize != "none":
            quantize_linear(self._denoiser, runtime.memory.quantize, runtime.dtype, runtime.device)
        if runtime.memory.idle == "keep":
            self._move(self._denoiser)
            for helper in self._helpers:
                self._on_device(helper)
        if runtime.memory.gradient_checkpointing:
            self._denoiser.enable_gradient_checkpointing()
        if runtime.memory.attention == "xformers":
            self._enable_xformers()

    @classmethod
    @abstractmethod
    def process_of(cls, architecture: Architecture, scheduler: Any) -> Process:
        """The noise process of the base.

        Args:
            scheduler: the base's own scheduler.
        """

    def _enable_xformers(self) -> None:
        try:
            self._denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ImagicError(
                f"xformers does not work on this machine ({error})",
                "an xformers build for the installed PyTorch and this GPU",
                "use --attention sdpa",
            ) from error

    @classmethod
    def load(cls, files: Files, name: str, revision: str | None, runtime: Runtime, master_weights: bool = False) -> LatentBase:
        """Loads a base from its files.

        Args:
            files: folder or single file of the base.
            name, revision, runtime: as in :class:`~imagic_lora.bases.base.Base`.
            master_weights: True for full fine-tuning: the denoiser is loaded in fp32, unless the runtime's ``master_weights`` is
                ``bf16-stochastic``. False: the denoiser has the runtime's precision.

        Raises:
            ImagicError: a component cannot be read, or does not match its config.
        """
        architecture = files.architecture
        denoiser, dtype = architecture.component, runtime.dtype
        weights_dtype = torch.float32 if master_weights and runtime.memory.master_weights == "fp32" else dtype

        def helper(part: str) -> Any:
            if part == "vae":
                return components.model(cls.vae_class, architecture.vae, files, part, vae_dtype(architecture, dtype))
            kind = architecture.encoder_classes[part]
            return components.text_encoder(kind, architecture.text_encoders[part], files, part, dtype)

        parts = {
            denoiser: components.model(cls.denoiser_class, architecture.denoiser, files, denoiser, weights_dtype),
            "scheduler": schedulers.scheduler(architecture.scheduler, files, architecture.few_steps),
            "vae": helper("vae"),
        }
        for encoder, config in architecture.text_encoders.items():
            parts[encoder] = helper(encoder)
            kind = architecture.encoder_classes[encoder]
            parts[tokenizer_of(encoder)] = components.tokenizer(kind, config, files, tokenizer_of(encoder))
        with library_errors(files.path):  # the constructor of a pipeline corrects outdated configs of its components
            pipeline = cls.pipelines["inpaint" if architecture.inpaints else "text2image"]
            pipeline(**(dict.fromkeys(cls.optional_components) | parts), **cls.unused_components)
        prediction = cls.process_of(architecture, parts["scheduler"]).prediction_type
        weights_hash = fingerprint(files, (denoiser, *architecture.text_encoders), prediction)
        return cls(architecture, parts, name, revision, weights_hash, runtime, helper)

    def offload_encoders(self) -> None:
        idle = self.runtime.memory.idle
        for name, helper in self._helpers.items():
            if helper is not None and idle == "offload":
                self._move(helper, torch.device("cpu"))
            elif idle == "release":
                self._helpers[name] = None
        self._move(self._denoiser)

    def _move(self, module: Any, device: torch.device | None = None) -> None:
        """Moves a module to a device, by default the runtime's. A move that an exception has interrupted is completed by the next one.

        Unless ``idle`` is ``keep``, each module is moved when it is first used: the denoiser follows after photo and prompt are encoded.
        """
        device = device or self.runtime.device
        if module in self._half_moved or next(module.parameters()).device != device:
            self._half_moved.add(module)
            module.to(device)
            self._half_moved.discard(module)

    def _on_device(self, name: str) -> Any:
        """The VAE or a text encoder: read again if it was released, frozen, on the device, with the VAE's memory levers applied."""
        if self._helpers[name] is None:
            self._helpers[name] = self._reload(name)
        helper = self._helpers[name]
        helper.requires_grad_(False).eval()
        kind = self.architecture.encoder_classes.get(name)
        if self.runtime.memory.quantize_text == "nf4" and kind in LARGE_ENCODERS and not hasattr(helper, "is_loaded_in_4bit"):
            # T5 casts what goes into its layers wo to the type of their weights, which 4-bit weights do not have
            quantize_linear(helper, "nf4", self.runtime.dtype, self.runtime.device, skipped=("wo",))
        self._move(helper)
        if name == "vae":
            memory = self.runtime.memory
            (helper.enable_tiling if memory.vae_tiling else helper.disable_tiling)()
            (helper.enable_slicing if memory.vae_slicing else helper.disable_slicing)()
        return helper

    def _kinds(self) -> list[str]:
        """The classes of the text encoders."""
        return [self.architecture.encoder_classes[encoder] for encoder in self.architecture.text_encoders]

    def load_encoders(self) -> None:
        """Reads and prepares the text encoders, as their first use does."""
        for encoder in self.architecture.text_encoders:
            self._on_device(encoder)

    def helper_bytes(self) -> list[int]:
        """Bytes of the weights of the VAE and of each text encoder; of those that are not released."""
        loaded = [helper for helper in self._helpers.values() if helper is not None]
        return [sum(tensor.nbytes for tensor in (*helper.parameters(), *helper.buffers())) for helper in loaded]

    def _make_room(self, name: str) -> None:
        """Moves the VAE and the other text encoders to host memory before a large one is used, unless ``idle`` is ``keep``."""
        for other, helper in self._helpers.items():
            if self.runtime.memory.idle != "keep" and other != name and helper is not None:
                self._move(helper, torch.device("cpu"))

    @property
    def denoiser(self) -> ModelMixin:
        return self._denoiser

    def _tokenized(self, name: str, prompt: str, reader: str | None = None) -> tuple[Tensor, Tensor]:
        """Token ids of a prompt and the mask of its padding, ``[1, T]`` int64, padded or truncated to the maximum length ``T``.

        Warns with the text that was cut off if the prompt is longer than ``T`` without the start token, if there is one, and the end token.

        Args:
            reader: what reads so few tokens, with its verb, for the warning; None for the base.
        """
        tokenizer = self._tokenizers[name]
        limit, all_ids = tokenizer.model_max_length, tokenizer(prompt).input_ids
        if len(all_ids) > limit:
            removed, added = tokenizer.decode(all_ids[limit - 1 : -1]), len(tokenizer("").input_ids)
            who = reader or "this base encodes"
            message = f"the prompt is longer than the {limit - added} tokens that {who}; the end is cut off: {removed!r}"
            warnings.warn(message, ImagicWarning, stacklevel=4)
        found = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").to(self.runtime.device)
        return found.input_ids, found.attention_mask

    def tokenize(self, prompt: str) -> list[Token]:
        tokenizer = self._tokenizers["tokenizer"]  # a second CLIP tokenizer has the same vocabulary
        encoded = tokenizer(prompt, max_length=tokenizer.model_max_length, truncation=True, return_offsets_mapping=True)
        return [Token(number, *span) for number, span in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditioning:
        return self.encode(prompt)

    @abstractmethod
    def encode(self, prompt: str) -> Conditioning:
        """As :meth:`encode_prompt`, with gradients."""

    def encode_vectors(self, prompt: str, vectors: Mapping[str, Tensor] | None = None) -> Conditioning:
        encoded: dict[str, Tensor] = {}

        def looked_up(encoder: str) -> Callable[[Any, Any, Tensor], Tensor]:
            def replaced(_: Any, __: Any, output: Tensor) -> Tensor:
                encoded[encoder] = output.detach().float() if vectors is None else vectors[encoder]
                return output if vectors is None else encoded[encoder].to(output)

            return replaced

        with ExitStack() as stack:
            for encoder in self.architecture.text_encoders:
                model = self._on_device(encoder)  # the encoder of T5 has its own module for the weights that it shares
                lookup = (model.encoder if hasattr(model, "shared") else model).get_input_embeddings()
                stack.callback(lookup.register_forward_hook(looked_up(encoder)).remove)
            if vectors is not None:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", ImagicWarning)  # that the prompt is too long was said when it was encoded
            return replace(self.encode(prompt), vectors=encoded)

    def vector_masks(self, prompt: str) -> dict[str, VectorMasks]:
        masks: dict[str, VectorMasks] = {}
        for encoder in self.architecture.text_encoders:
            ids, mask = self._tokenized(tokenizer_of(encoder), prompt)
            special = torch.isin(ids, ids.new_tensor(self._tokenizers[tokenizer_of(encoder)].all_special_ids))
            masks[encoder] = VectorMasks(mask.bool() & ~special, ~mask.bool())
        return masks

    def word_mask(self, prompt: str) -> Tensor:
        return self._tokenized("tokenizer", prompt)[1].bool()

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        vae = self._on_device("vae")
        return self.normalized(vae, vae.encode(image.to(self.runtime.device, vae.dtype)).latent_dist.mode().float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._on_device("vae")
        return vae.decode(self.denormalized(vae, latents.to(self.runtime.device, vae.dtype))).sample.float()

    def normalized(self, vae: Any, encoded: Tensor) -> Tensor:
        """The latents ``[B, C, h, w]`` of the denoiser, from those of the VAE."""
        return (encoded - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    def denormalized(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalized`."""
        return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self._move(self._denoiser)
        dtype = self._denoiser.dtype
        conditioning = conditioning.expand(len(x_t)).to(x_t.device, dtype)
        mixed = dtype == torch.float32 and self.runtime.dtype != torch.float32
        with torch.autocast(self.runtime.device.type, self.runtime.dtype, enabled=mixed, cache_enabled=self.runtime.memory.autocast_cache):
            return self.denoise(x_t.to(dtype), timesteps, conditioning)

    @abstractmethod
    def denoise(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As :meth:`predict`, for inputs of one batch size, on the device and in the precision of the denoiser."""
