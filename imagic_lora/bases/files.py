"""What the files of a base say without loading them: their variant and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ImagicError

_SAMPLES = 16  # values of a tensor that enter the fingerprint


def variant(folder: Path) -> str | None:
    """``fp16`` where a folder holds its U-Net in that variant only, else None."""
    files = [path.name for path in (folder / "unet").glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def weight_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files that a component is loaded from."""
    fp16 = variant(folder) == "fp16"
    files = sorted((folder / component).glob("*.safetensors"))
    return [path for path in files if (".fp16." in path.name) == fp16 and ".non_ema." not in path.name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ImagicError(f"{path} is not a whole safetensors file ({error})", "safetensors", "download the base again") from error
    with file as inside:
        yield inside


def fingerprint(folder: Path, components: tuple[str, ...]) -> str:
    """A hash over names, shapes and sampled values of every tensor, the values rounded to half precision.

    So the same weights have the same fingerprint in fp16 and in fp32. Only the first row of a tensor is read, which keeps it fast at
    any size.
    """
    digest = hashlib.sha256()
    for component in components:
        rows: dict[str, tuple[list[int], torch.Tensor]] = {}
        for path in weight_files(folder, component):
            with _opened(path) as file:
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
