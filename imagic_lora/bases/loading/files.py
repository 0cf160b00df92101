"""The weights of a base, read from safetensors files under diffusers' tensor names, and their fingerprint."""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ImagicError
from ...core.tensors import open_safetensors
from ..architecture import Architecture
from .configs import architecture_at, component_folder, folder_of_parts
from .known import BaseEntry
from .tokenizers import qwen_tokenizer_files, t5_tokenizer_files, tokenizer_files
from .vetting import unusable_base

STEMS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""Name of a component's weight file without its extension, by component."""
_FINGERPRINT_VALUES = 16  # sampled values of each tensor
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # names of safetensors for the types that weights can have
_NO_WEIGHTS = ("position_ids", "num_batches_tracked")
_UNUSED = re.compile(r"(text_projection\.weight|logit_scale|visual_projection\.weight|vision_model\..*)$")  # in a CLIPTextModel's files
_BLOCK = re.compile(r"layers\.(\d+)\.")
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"  # one weight under two names, in files of T5
_MAX_WEIGHTS = 2**34  # of one component; the transformer of FLUX.2 klein 9B, the largest supported, has about half of that


class Files(ABC):
    """The files of a base. Components are named as the folders of diffusers' format: ``unet``, ``vae``, ``text_encoder``, ...

    Args:
        path: folder or single file.
        entry: entry of a named base, whose settings override those of the files; None for other bases.
    """

    def __init__(self, path: Path, entry: BaseEntry | None = None) -> None:
        self.path, self.entry = path, entry

    @cached_property
    def architecture(self) -> Architecture:
        """Configs of the components. They are read at the first access."""
        return architecture_at(self.path, self.entry)

    @abstractmethod
    def component_path(self, part: str) -> Path:
        """Folder or file of a component, for error messages."""

    @abstractmethod
    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of a component by diffusers' names. They are memory-mapped: the file is read when a tensor is used."""

    @abstractmethod
    def tokenizer(self, part: str) -> dict[str, str]:
        """Files of a tokenizer: vetted content by file name."""

    def padding(self, part: str) -> str | None:
        """The token that fills up a prompt, if it is also a word of a prompt; None for the one that the tokenizer's files name.

        diffusers' folders of Stable Diffusion 2 and XL name ``!``, and their tokenizers read every ``!`` of a prompt as padding. OpenCLIP,
        ComfyUI and A1111 fill up with the same id, and read a ``!`` as punctuation.
        """
        return None


class Folder(Files):
    """A base in diffusers' own format: ``model_index.json`` and a folder for each component, some of which may be those of another base."""

    def component_path(self, part: str) -> Path:
        return component_folder(self.path, part, folder_of_parts(self.entry))

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of a component by diffusers' names, without position ids and counters, which are buffers and not weights.

        Raises:
            ImagicError: there is no weight file; a file is incomplete; a tensor is in two files, or is not of floating point; there are
                more than 2**34 weights.
        """
        tensors: dict[str, Tensor] = {}
        for path in weight_files(self.component_path(part).parent, part):
            for name, tensor in weights(path).items():
                if name in tensors:
                    raise unusable_base(f"{path} holds {name[:80]!r}, and so does another file of the folder", "each tensor once")
                tensors[name] = tensor
        if not tensors:
            raise unusable_base(
                f"{self.component_path(part)} holds no weights", f"{STEMS[part]}.safetensors; pickles (.bin, .ckpt) are not read"
            )
        kind, text = self.architecture.encoder_classes.get(part), self.architecture.text_encoders.get(part, {})
        return check_count(used_tensors(kind, tensors, text.get("num_hidden_layers")), self.component_path(part))

    def tokenizer(self, part: str) -> dict[str, str]:
        match self.architecture.encoder_classes[part.replace("tokenizer", "text_encoder")]:
            case "T5EncoderModel":
                return t5_tokenizer_files(self.component_path(part))
            case "Qwen3ForCausalLM":
                return qwen_tokenizer_files(self.component_path(part))
            case _:
                return tokenizer_files(self.component_path(part))


def weight_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files of a component: one whole file, otherwise shards, otherwise either of them in the fp16 variant.

    The files are found by their names. The index of shards is not read, because it could name files outside the folder.
    """
    for stem in (STEMS[component], f"{STEMS[component]}.fp16"):
        for pattern in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"):
            files = sorted(path for path in (folder / component).glob(pattern) if path.is_file())
            if files:
                return files
    return []


def weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Memory-mapped tensors of a safetensors file by name, without position ids and counters.

    Args:
        path: the file.
        prefixes: only tensors whose name starts with one of these are returned.

    Raises:
        ImagicError: the file is incomplete; a returned tensor is not of floating point.
    """
    tensors: dict[str, Tensor] = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118  # safe_open is not a mapping
            if name.endswith(_NO_WEIGHTS) or not name.startswith(prefixes):
                continue
            if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS:
                raise ImagicError(
                    f"{path} holds {name[:80]!r} as {dtype}", f"weights in {', '.join(_FLOATS)}", "take a file that is not quantized"
                )
            tensors[name] = file.get_tensor(name)
    return tensors


def used_tensors(kind: str | None, tensors: dict[str, Tensor], layers: int | None = None) -> dict[str, Tensor]:
    """The tensors of a component without those that no pipeline uses: a CLIPTextModel may come with the other half of its CLIP, and Qwen3
    with a head and with layers above the last one that is read.

    Args:
        kind: class of a text encoder; None for another component.
        tensors: by diffusers' names.
        layers: number of layers that are read, of Qwen3.
    """
    if kind == "Qwen3ForCausalLM":
        names = {name: name.removeprefix("model.") for name in tensors if name not in ("lm_head.weight", "model.norm.weight")}
        blocks = {name: _BLOCK.match(inner) for name, inner in names.items()}
        return {inner: tensors[name] for name, inner in names.items() if not ((block := blocks[name]) and int(block[1]) >= (layers or 0))}
    if kind == "T5EncoderModel" and _SHARED in tensors and _TIED in tensors and torch.equal(tensors[_SHARED], tensors[_TIED]):
        return {name: value for name, value in tensors.items() if name != _TIED}
    return {name: value for name, value in tensors.items() if kind != "CLIPTextModel" or not _UNUSED.match(name)}


def check_count(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Returns the tensors unchanged.

    Raises:
        ImagicError: there are more than 2**34 weights.
    """
    if (count := sum(tensor.numel() for tensor in state.values())) > _MAX_WEIGHTS:
        raise unusable_base(f"{where} holds {count:,} weights", f"at most {_MAX_WEIGHTS:,}")
    return state


def cast_finite(state: dict[str, Tensor], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
    """Converts tensors to another precision.

    Raises:
        ImagicError: a converted value is NaN or infinity, which would turn every image black.
    """
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            got = f"{name[:80]!r} in {where} holds NaN or infinity in {str(dtype).removeprefix('torch.')}"
            raise ImagicError(got, "finite weights", "try --dtype fp32, or download the base again")
    return state


def fingerprint(files: Files, components: Iterable[str], prediction: str) -> str:
    """SHA-256 over the prediction type and the name, shape and 16 sampled values of every tensor, the values rounded to half precision.

    The same weights have the same fingerprint in fp16, in fp32 and in a single file. Only the first row of each tensor is read, so that it
    takes little time at any size.

    Args:
        files: files of the base.
        components: names of the components to include, in a fixed order.
        prediction: prediction type; ``epsilon`` adds nothing to the hash.
    """
    digest = hashlib.sha256(b"" if prediction == "epsilon" else prediction.encode())
    for component in components:
        # older versions of transformers write the prefix
        rows = {name.removeprefix("text_model."): tensor for name, tensor in files.tensors(component).items()}
        for name in sorted(rows):
            flat = (rows[name][0:1] if rows[name].ndim else rows[name]).flatten()
            sampled = flat[torch.linspace(0, flat.numel() - 1, min(_FINGERPRINT_VALUES, flat.numel())).long()]
            digest.update(f"{component}.{name}{list(rows[name].shape)}".encode())
            digest.update(sampled.half().numpy().tobytes())
    return digest.hexdigest()
