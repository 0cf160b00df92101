"""Single files: ``.safetensors`` checkpoints in the original layout, converted to diffusers' components by diffusers' functions."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    LDM_CLIP_PREFIX_TO_REMOVE,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from ....core.errors import ImagicError
from ..files import Files, check_count, used_tensors, weights
from ..known import local_path
from ..published import PUBLISHED
from ..tokenizers import shipped_tokenizer, tokenizer_files
from ..vetting import library_errors, unusable_base

_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_EXTRAS = {  # beside the weights; neither diffusers nor ComfyUI nor A1111 uses them
    "vae": re.compile(r"(first_stage_model|vae)\.(loss|model_ema)\."),
    "text_encoder": re.compile(
        r"(cond_stage_model|conditioner\.embedders\.0)\.(model\.)?(logit_scale$|text_projection$|attn_mask$|visual\.)"
    ),
    "text_encoder_2": re.compile(r"conditioner\.embedders\.1\.(model\.)?(logit_scale$|attn_mask$|visual\.)"),
}
_MAX_TENSORS = 4000  # of one component; the U-Net of Stable Diffusion XL has 1,680
_OPEN_CLIP_NAMES = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].values()  # outside of its transformer
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}


class SingleFile(Files):
    """A base in one file. Its configs and tokenizer come from this package, or from the ``config`` of its entry."""

    def component_path(self, part: str) -> Path:
        return self.path

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of a component by diffusers' names.

        Raises:
            ImagicError: the file is incomplete; it holds no tensor of the component, or more than 4000; diffusers cannot convert them; a
                tensor has no place in the component.
        """
        original = check_count(weights(self.path, _PREFIXES[part]), self.path)
        if part in _EXTRAS:
            original = {name: tensor for name, tensor in original.items() if not _EXTRAS[part].match(name)}
        if not 0 < len(original) <= _MAX_TENSORS:
            expected = "a complete checkpoint with U-Net, VAE and text encoders"
            remedy = "take the whole checkpoint, or build a folder in diffusers' format from its parts"
            raise ImagicError(f"{self.path} holds {len(original)} tensors of a {part}", expected, remedy)
        with library_errors(self.path):
            converted = self._converted(part, original)
        if missing := [name for name, tensor in converted.items() if tensor is None]:
            raise unusable_base(f"{self.path} lacks {missing[0][:80]!r} of its {part}", "a complete checkpoint")
        if unused := self._unused(part, original, converted):
            got = f"{self.path} holds {unused[:80]!r}, which has no place in the {part} of this kind of base"
            raise ImagicError(
                got, "the tensors of a known model", "choose another base, or add this one to your list with a matching config"
            )
        return used_tensors(self.architecture.encoder_classes.get(part), converted)

    def _unused(self, part: str, original: dict[str, Tensor], converted: dict[str, Tensor]) -> str | None:
        """Name of a tensor that the conversion has left out; diffusers does so in silence."""
        if part in _OPEN_CLIP:
            prefix = _OPEN_CLIP[part]
            kept = (f"{prefix}transformer.", *LDM_CLIP_PREFIX_TO_REMOVE, *(prefix + name for name in _OPEN_CLIP_NAMES))
            return next((name for name in original if not name.startswith(kept)), None)
        used = {tensor.data_ptr() for tensor in converted.values()}
        return next((name for name, tensor in original.items() if tensor.numel() and tensor.data_ptr() not in used), None)

    def _converted(self, part: str, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the tensors of a component from the original layout to diffusers' layout."""
        if part == "unet":
            return convert_ldm_unet_checkpoint(original, self.architecture.denoiser)
        if part == "vae":
            return convert_ldm_vae_checkpoint(original, self.architecture.vae)
        prefix = _OPEN_CLIP[part]
        if not any(name.startswith(prefix) for name in original):
            return convert_ldm_clip_checkpoint(original)
        model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=self.architecture.text_encoders[part]["hidden_size"]))
        return convert_open_clip_checkpoint(model, original, prefix)

    def tokenizer(self, part: str) -> dict[str, str]:
        folder = self._configs()
        return tokenizer_files(folder / part) if folder else shipped_tokenizer()

    def padding(self, part: str) -> str | None:
        encoder = self.architecture.text_encoders[part.replace("tokenizer", "text_encoder")]
        is_open_clip = encoder.get("hidden_act") == "gelu"
        return "!" if is_open_clip and self._configs() is None else None  # OpenCLIP pads with token 0

    def _configs(self) -> Path | None:
        """The folder of configs and tokenizers that the entry names."""
        config = self.entry.config if self.entry else None
        return local_path(config) if config and config not in PUBLISHED else None
