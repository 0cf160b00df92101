"""Reading and writing safetensors files. Equal content gives equal bytes, and files with NaN or infinity are rejected."""

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

from .errors import ImagicError, NotFinite, unreadable
from .text import check_utf8

_MAX_HEADER = 2**22  # bytes; the header of Stable Diffusion's U-Net has a fiftieth of that
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def safetensors_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Serialises tensors to the bytes of a safetensors file, in pieces.

    The safetensors library writes metadata in random order and needs a second copy of all tensors. This function does neither.

    Args:
        tensors: by name; of the types in ``_DTYPE_NAMES``.
        metadata: stored in the header.

    Yields:
        The header, then the bytes of one tensor at a time.

    Raises:
        NotFinite: a tensor holds NaN or infinity.
    """
    check_finite(tensors)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each tensor is aligned to its element size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_finite(tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Raises NotFinite if a tensor holds NaN or infinity; ``where`` follows the name of the tensor in the message."""
    real = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    if all_finite(real.values()):
        return
    name = next(name for name, value in real.items() if not value.isfinite().all())
    raise NotFinite(
        f"{name}{where} holds numbers that are not finite", "finite numbers", "try --dtype fp32 or bf16, or a lower learning rate"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity. Synchronises with the device.

    Args:
        tensors: floating-point tensors.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return True
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(filled)])  # one fast pass; the norm of finite numbers can overflow
    return bool(norms.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in filled)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file with :func:`safetensors.safe_open`, as a context manager.

    Raises:
        ImagicError: the file cannot be read, is not a safetensors file, or is incomplete; its path is not UTF-8.
    """
    check_utf8(str(path), "the path")
    try:
        with path.open("rb") as raw:
            if (size := int.from_bytes(raw.read(8), "little")) > _MAX_HEADER:
                raise SafetensorError(f"a header of {size:,} bytes")
        file = safe_open(path, "pt")
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise _not_whole(path, error) from error
    try:
        with file as handle:
            yield handle
    except SafetensorError as error:  # an OSError comes from the caller's own code
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> ImagicError:
    return ImagicError(f"{path} is not a whole safetensors file ({error})", "a complete safetensors file", "create or download it again")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, read from the header.

    Raises:
        ImagicError: as :func:`open_safetensors`.
    """
    with open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping


def read(path: Path, whole_numbers: bool = False) -> dict[str, Tensor]:
    """Reads all tensors of a file into host memory.

    Args:
        path: a safetensors file.
        whole_numbers: whether integer tensors are allowed.

    Raises:
        ImagicError: as :func:`open_safetensors`; a tensor has another type than fp32, fp16, bf16 and the allowed integers.
        NotFinite: a tensor holds NaN or infinity.
    """
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    allowed = [dtype for dtype in _DTYPE_NAMES if dtype.is_floating_point or whole_numbers]
    if odd := sorted({str(value.dtype) for value in tensors.values() if value.dtype not in allowed}):
        raise ImagicError(f"{path} holds {', '.join(odd)}", ", ".join(map(str, allowed)), "create or copy it again")
    check_finite(tensors, f" in {path}")
    return tensors
