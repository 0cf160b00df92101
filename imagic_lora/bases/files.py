"""The weights of a base: safetensors and nothing else, under the names that diffusers gives them. And their fingerprint."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ImagicError
from ..tensors import opened
from .vetting import refused

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_SAMPLES = 16  # values of a tensor that enter the fingerprint
_MOST = 2**32  # weights of a component; the largest of Stable Diffusion has a fifth of that


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


def tensors(folder: Path, component: str) -> dict[str, Tensor]:
    """All tensors of a component as views of its files, which are read as they are used; without position ids, which are no weights.

    Raises:
        ImagicError: there is no such file, one is not whole, or it holds something that is no weight, or far too many of them.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder, component):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name.endswith("position_ids"):
                    continue
                if (kind := file.get_slice(name).get_dtype()) not in ("F32", "F16", "BF16"):
                    raise refused(f"{path} holds {name[:80]!r} as {kind}", "weights in F32, F16 or BF16")
                if name in found:
                    raise refused(f"{path} holds {name[:80]!r}, as another file beside it does", "every tensor once")
                found[name] = file.get_tensor(name)
    if not found:
        raise refused(f"{folder / component} holds no weights", f"{STEMS[component]}.safetensors")
    if (count := sum(tensor.numel() for tensor in found.values())) > _MOST:
        raise refused(f"{folder / component} holds {count:,} weights", f"at most {_MOST:,}")
    return found


def finite(state: dict[str, Tensor], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
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


def fingerprint(folder: Path, components: tuple[str, ...]) -> str:
    """A hash over names, shapes and sampled values of every tensor, the values rounded to half precision.

    So the same weights have the same fingerprint in fp16 and in fp32. Only the first row of a tensor is read, which keeps it fast at
    any size.
    """
    digest = hashlib.sha256()
    for component in components:
        rows: dict[str, tuple[list[int], torch.Tensor]] = {}
        for path in weight_files(folder, component):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    rows[name] = (shape, part[0:1] if shape else file.get_tensor(name))
        for name in sorted(rows):
            shape, row = rows[name]
            if not row.is_floating_point():
                continue  # position ids and the like: buffers that come and go between library versions
            flat = row.flatten()
            picked = flat[torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel())).long()]
            digest.update(f"{component}.{name}{shape}".encode())
            digest.update(picked.half().numpy().tobytes())
    return digest.hexdigest()
