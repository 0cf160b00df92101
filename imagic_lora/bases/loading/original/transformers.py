"""Flow transformers in one file, as ComfyUI reads them: alone, with their VAE, and of Stable Diffusion 3 with text encoders.

A folder in diffusers' format has what the file lacks, and always the configs and the tokenizers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from ....core.errors import ImagicError
from ...architecture import KleinArchitecture
from ..configs import folder_of_parts
from ..files import Files, Folder, check_count, used_tensors, weights
from ..known import BaseEntry
from ..vetting import library_errors
from .detection import TEXT_PREFIXES, TRANSFORMER_PREFIX, VAE_PREFIX

_UNUSED_VAE = re.compile(r"(loss|model_ema)\.")  # beside the weights; neither diffusers nor ComfyUI uses them
_UNUSED_TEXT = re.compile(r"logit_scale$")  # as above
_TEXT_MODEL = "transformer."
_PROJECTION = "text_projection.weight"


class TransformerFile(Files):
    """A base whose denoiser is in a single file; its entry names the base that has the configs and the other components.

    The pooled embedding of the first CLIP text encoder of such a file is not projected: diffusers and ComfyUI take the identity, whatever
    the file holds.
    """

    def __init__(self, path: Path, entry: BaseEntry) -> None:
        super().__init__(path, entry)
        folder = folder_of_parts(entry)
        assert folder is not None
        self._parts = Folder(folder)

    def component_path(self, part: str) -> Path:
        own = part == "transformer" or (part == "vae" and self._vae()) or (part in TEXT_PREFIXES and self._text(part))
        return self.path if own else self._parts.component_path(part)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of a component by diffusers' names: the denoiser's, and what else the file has; others from the named base.

        Raises:
            ImagicError: the file is incomplete; diffusers cannot convert its tensors; one of them has no place in the component.
        """
        if part == "transformer":
            others = (VAE_PREFIX, *TEXT_PREFIXES.values())
            return self._converted({name: tensor for name, tensor in self._all().items() if not name.startswith(others)})
        if part == "vae" and (vae := self._vae()):
            with library_errors(self.path):
                converted = convert_ldm_vae_checkpoint(vae, self.architecture.vae)
            used = {tensor.data_ptr() for tensor in converted.values()}
            self._check_used([name for name, tensor in vae.items() if tensor.data_ptr() not in used])
            return converted
        if part in TEXT_PREFIXES and (text := self._text(part)):
            return self._text_encoder(part, text)
        return self._parts.tensors(part)

    def tokenizer(self, part: str) -> dict[str, str]:
        return self._parts.tokenizer(part)

    def _all(self) -> dict[str, Tensor]:
        return check_count(weights(self.path), self.path)

    def _vae(self) -> dict[str, Tensor]:
        """The tensors of the VAE by their names in the original layout; none if the file has no VAE."""
        own = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in self._all().items() if name.startswith(VAE_PREFIX)}
        return {name: tensor for name, tensor in own.items() if not _UNUSED_VAE.match(name)}

    def _text(self, part: str) -> dict[str, Tensor]:
        """The tensors of a text encoder by their names in the file, without its prefix; none if the file does not have it."""
        prefix = TEXT_PREFIXES[part]
        own = {name.removeprefix(prefix): tensor for name, tensor in self._all().items() if name.startswith(prefix)}
        return {name: tensor for name, tensor in own.items() if not _UNUSED_TEXT.match(name)}

    def _text_encoder(self, part: str, text: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a text encoder by the names of transformers, from those of :meth:`_text`."""
        self._check_used([TEXT_PREFIXES[part] + name for name in text if not name.startswith(_TEXT_MODEL)])
        named = {name.removeprefix(_TEXT_MODEL): tensor for name, tensor in text.items()}
        if part == "text_encoder":
            config = self.architecture.text_encoders[part]
            named |= {_PROJECTION: torch.eye(config["projection_dim"], config["hidden_size"])}
        return used_tensors(self.architecture.encoder_classes[part], named)

    def _converted(self, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """The denoiser's tensors by diffusers' names; those of a file that has these names already are returned as they are."""
        original = {name.removeprefix(TRANSFORMER_PREFIX): tensor for name, tensor in original.items()}
        if any(name.startswith("transformer_blocks.") for name in original):
            return original
        convert: Any = convert_sd3_transformer_checkpoint_to_diffusers
        if isinstance(self.architecture, KleinArchitecture):
            convert = convert_flux2_transformer_checkpoint_to_diffusers
        with library_errors(self.path):
            converted = convert(original)  # takes the tensors that it converts out of its argument
        self._check_used(list(original))
        return converted

    def _check_used(self, left: list[str]) -> None:
        if left:
            got = f"{self.path} holds {left[0][:80]!r}, which has no place in this kind of base"
            raise ImagicError(got, "the tensors of a known model", "choose another base, or another base in parts")
