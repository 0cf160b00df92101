"""The weights of a base: safetensors and nothing else, under the names that diffusers gives them. And their fingerprint."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ImagicError
from ...core.tensors import opened
from ..architecture import Architecture
from .configs import architecture_at
from .known import BaseEntry
from .tokenizers import tokenizer_files
from .vetting import unusable_base

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_SAMPLES = 16  # values of a tensor that enter the fingerprint
_MOST = 2**32  # weights of a component; the largest of Stable Diffusion XL has two thirds of that


class Files(ABC):
    """Where a base is read from. Components have the names of their folders in diffusers' format.

    Args:
        known: what is known of the base besides its files.
    """

    def __init__(self, path: Path, known: BaseEntry | None = None) -> None:
        self.path, self.entry = path, known

    @cached_property
    def architecture(self) -> Architecture:
        """The configs of its components, read once."""
        return architecture_at(self.path, self.entry)

    @abstractmethod
    def place(self, part: str) -> Path:
        """Where a component is, for messages."""

    @abstractmethod
    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a component under diffusers' names, as views of files that are read as they are used."""

    @abstractmethod
    def tokenizer(self, part: str) -> dict[str, str]:
        """The files of a tokenizer: names and vetted text."""


class Folder(Files):
    """A base in diffusers' own format: ``model_index.json`` and a folder for each component."""

    def place(self, part: str) -> Path:
        return self.path / part

    def tensors(self, part: str) -> dict[str, Tensor]:
        """All tensors of a component, without position ids, which are no weights.

        Raises:
            ImagicError: there is no such file, one is not whole, or it holds something that is no weight, or far too many of them.
        """
        found: dict[str, Tensor] = {}
        for path in weight_files(self.path, part):
            for name, tensor in weights(path).items():
                if name in found:
                    raise unusable_base(f"{path} holds {name[:80]!r}, as another file beside it does", "every tensor once")
                found[name] = tensor
        if not found:
            raise unusable_base(f"{self.place(part)} holds no weights", f"{STEMS[part]}.safetensors; pickles (.bin, .ckpt) are not read")
        return check_count(found, self.place(part))

    def tokenizer(self, part: str) -> dict[str, str]:
        return tokenizer_files(self.path / part)


def weight_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files that a component is loaded from: the one whole file, else its shards, else either in the fp16 variant.

    They are found by their names. An index of shards, which might name any file anywhere, is not read.
    """
    for stem in (STEMS[component], f"{STEMS[component]}.fp16"):
        for pattern in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"):
            files = sorted(path for path in (folder / component).glob(pattern) if path.is_file())
            if files:
                return files
    return []


def weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a file as views of it, without position ids.

    Args:
        prefixes: of the names that are asked for.

    Raises:
        ImagicError: it is not whole, or holds something that is no weight.
    """
    found: dict[str, Tensor] = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            if name.endswith("position_ids") or not name.startswith(prefixes):
                continue
            if (kind := file.get_slice(name).get_dtype()) not in ("F32", "F16", "BF16"):
                raise unusable_base(f"{path} holds {name[:80]!r} as {kind}", "weights in F32, F16 or BF16")
            found[name] = file.get_tensor(name)
    return found


def check_count(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors.

    Raises:
        ImagicError: there are far too many weights.
    """
    if (count := sum(tensor.numel() for tensor in state.values())) > _MOST:
        raise unusable_base(f"{where} holds {count:,} weights", f"at most {_MOST:,}")
    return state


def cast_finite(state: dict[str, Tensor], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
    """The tensors in another precision.

    Raises:
        ImagicError: a value is not finite, or is no longer: it would paint black pictures.
    """
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.numel() and not all(math.isfinite(end) for end in torch.aminmax(tensor)):
            got = f"{name[:80]!r} in {where} holds NaN or infinity in {str(dtype).removeprefix('torch.')}"
            raise ImagicError(got, "finite weights", "try --dtype fp32, or download the base again")
    return state


def fingerprint(files: Files, components: Iterable[str], prediction: str) -> str:
    """A hash over names, shapes and sampled values of every tensor, the values rounded to half precision, and what they predict.

    So the same weights have the same fingerprint in fp16, in fp32 and in a single file. Only the first row of a tensor is read, which keeps
    it fast at any size.
    """
    digest = hashlib.sha256(b"" if prediction == "epsilon" else prediction.encode())
    for component in components:
        rows = {name.removeprefix("text_model."): tensor for name, tensor in files.tensors(component).items()}  # older libraries say so
        for name in sorted(rows):
            flat = (rows[name][0:1] if rows[name].ndim else rows[name]).flatten()
            picked = flat[torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel())).long()]
            digest.update(f"{component}.{name}{list(rows[name].shape)}".encode())
            digest.update(picked.half().numpy().tobytes())
    return digest.hexdigest()
