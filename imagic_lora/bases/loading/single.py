"""A checkpoint in the original layout, one ``.safetensors`` file, read as the components that diffusers makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from .configs import local_path
from .files import Files, check_count, weights
from .published import PUBLISHED
from .tokenizers import shipped_tokenizer, tokenizer_files
from .vetting import library_errors, unusable_base

_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_MOST = 4000  # tensors of a component; the U-Net of Stable Diffusion XL has 1,680
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}


class SingleFile(Files):
    """A base in one file. diffusers knows its names; configs and tokenizer come along with this package, or are given."""

    def place(self, part: str) -> Path:
        return self.path

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Those of a component, as diffusers names them.

        Raises:
            ImagicError: the file is not whole, or holds none of it.
        """
        held = check_count(weights(self.path, _PREFIXES[part]), self.path)
        if not 0 < len(held) <= _MOST:
            raise unusable_base(f"{self.path} holds {len(held)} tensors of a {part}", "a whole checkpoint: U-Net, VAE and text encoders")
        with library_errors(self.path):
            found = self._converted(part, held)
        if missing := [name for name, tensor in found.items() if tensor is None]:
            raise unusable_base(f"{self.path} lacks {missing[0][:80]!r} of its {part}", "a whole checkpoint")
        return found

    def _converted(self, part: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
        built = self.architecture
        if part == "unet":
            return convert_ldm_unet_checkpoint(held, built.unet)
        if part == "vae":
            return convert_ldm_vae_checkpoint(held, built.vae)
        prefix = _OPEN_CLIP[part]
        if not any(name.startswith(prefix) for name in held):
            return convert_ldm_clip_checkpoint(held)
        model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=built.text_encoders[part]["hidden_size"]))
        return convert_open_clip_checkpoint(model, held, prefix)

    def tokenizer(self, part: str) -> dict[str, str]:
        config = self.entry.config if self.entry else None
        given = local_path(config) if config and config not in PUBLISHED else None
        if given:
            return tokenizer_files(given / part)
        encoder = self.architecture.text_encoders[part.replace("tokenizer", "text_encoder")]
        return shipped_tokenizer("!" if encoder.get("hidden_act") == "gelu" else "<|endoftext|>")  # OpenCLIP pads with its first token
