"""Tensors to and from safetensors files: equal content is equal bytes, and nothing that is not finite goes out or comes in."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ImagicError, NotFinite

_LONGEST = 2**22  # bytes of a header; that of Stable Diffusion's U-Net has a fiftieth
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def safetensors_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, one tensor after the other, so that no second copy of them all is needed.

    The library itself writes its metadata in random order, and gives the whole file at once.

    Raises:
        NotFinite: a tensor holds NaN or infinity.
    """
    check_finite(tensors)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each starts at a multiple of its width
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_finite(tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Raises NotFinite if a tensor holds NaN or infinity."""
    real = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    if all_finite(real.values()):
        return
    name = next(name for name, value in real.items() if not value.isfinite().all())
    raise NotFinite(
        f"{name}{where} holds numbers that are not finite", "finite numbers", "try --dtype fp32 or bf16, or a lower learning rate"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether none of the floating-point tensors holds NaN or infinity; waits for the device."""
    several = [one for one in tensors if one.numel()]
    if not several:
        return True
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(several)])  # one fast pass; a norm of finite numbers may overflow
    return bool(norms.isfinite().all()) or all(bool(one.isfinite().all()) for one in several)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, as the library opens it.

    Raises:
        ImagicError: it is not one, or not whole.
    """
    try:
        with path.open("rb") as raw:
            if (size := int.from_bytes(raw.read(8), "little")) > _LONGEST:
                raise SafetensorError(f"a header of {size:,} bytes")
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise _not_whole(path, error) from error
    try:
        with file as inside:
            yield inside
    except SafetensorError as error:  # an OSError is of what the caller does meanwhile
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> ImagicError:
    return ImagicError(f"{path} is not a whole safetensors file ({error})", "safetensors", "make or download it again")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, read from its header.

    Raises:
        ImagicError: as :func:`opened`.
    """
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping


def read(path: Path, whole_numbers: bool = False) -> dict[str, Tensor]:
    """Copies of the tensors of a file, in host memory.

    Args:
        whole_numbers: may be among them.

    Raises:
        ImagicError: as :func:`opened`, or numbers of odd types; NotFinite: a tensor holds NaN or infinity.
    """
    with opened(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    known = [dtype for dtype in _NAMES if dtype.is_floating_point or whole_numbers]
    if odd := sorted({str(value.dtype) for value in tensors.values() if value.dtype not in known}):
        raise ImagicError(f"{path} holds {', '.join(odd)}", ", ".join(map(str, known)), "make or copy it again")
    check_finite(tensors, f" in {path}")
    return tensors
