"""The card, the free memory and bitsandbytes of this machine.

This module does not import torch. If torch is not loaded yet, the graphics driver is queried instead.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .errors import ImagicError

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.free,compute_cap", "--format=csv,noheader,nounits")
_AMD_DEVICES = Path("/sys/class/drm")
_reusable: list[Callable[[str], int]] = []
_DRIVER_TIMEOUT = 5  # seconds after which a driver that does not answer counts as none


@dataclass(frozen=True)
class Card:
    """A CUDA device.

    Args:
        index: number of the device in PyTorch's order.
        name: name of the device.
        free: free memory in bytes.
        native_bf16: whether the device computes in bf16 (NVIDIA: compute capability 8.0 or higher).
    """

    index: int
    name: str
    free: int
    native_bf16: bool


def find_card(index: int | None = None) -> Card | None:
    """Returns the card that PyTorch would use, or None if it cannot use any.

    If PyTorch is loaded, it is asked. Importing it takes seconds, so otherwise the driver is queried; the installed build of PyTorch and
    ``CUDA_VISIBLE_DEVICES`` limit the result.

    Args:
        index: number of the device; PyTorch's current device by default.

    Raises:
        ImagicError: there are cards, but none of this number.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        list_cards = {"cuda": _nvidia_cards, "hip": _amd_cards, None: list}[_torch_backend()]
        cards: list[Card] = list_cards()
        return cards[_checked(index or 0, len(cards))] if cards else None
    if not torch.cuda.is_available():
        return None
    device: int = torch.cuda.current_device() if index is None else _checked(index, torch.cuda.device_count())
    native_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return Card(device, torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0] + reusable_memory("cuda"), native_bf16)


def visible_cards() -> list[tuple[Card, dict[str, str]]]:
    """Returns every card that this process may use, with the environment in which another process sees that card alone.

    The driver is asked, and PyTorch is not loaded. Cards of NVIDIA are named by their UUID, because CUDA may number them in another order
    than the driver; cards of AMD by the number that the runtime of ROCm gives them.
    """
    variable, rows = {
        "cuda": ("CUDA_VISIBLE_DEVICES", _nvidia_rows),
        "hip": ("HIP_VISIBLE_DEVICES", _amd_rows),
        None: ("", list[tuple[str, Card]]),
    }[_torch_backend()]
    return [(card, {variable: value}) for value, card in rows()]


def _checked(index: int, count: int) -> int:
    """Returns the number of a card unchanged; raises ImagicError if it is not below the number of cards."""
    if index >= count:
        got = f"this process is number {index} on a machine with {count} CUDA device{'' if count == 1 else 's'}"
        raise ImagicError(got, "one device for each process, numbered from 0", "use a lower --num_processes of accelerate launch")
    return index


def free_host_memory() -> int:
    """Available host memory in bytes."""
    return psutil.virtual_memory().available + reusable_memory("cpu")


def reusable_memory(device: str) -> int:
    """Bytes on a type of device that this process holds, and gives back before it loads a model."""
    return sum(held(device) for held in _reusable)


@contextmanager
def counted_as_free(held: Callable[[str], int]) -> Iterator[None]:
    """Counts memory of this process as free inside the context.

    Args:
        held: returns the bytes on a type of device, ``cuda`` or ``cpu``.
    """
    _reusable.append(held)
    try:
        yield
    finally:
        _reusable.remove(held)


def bitsandbytes_error() -> Exception | None:
    """Returns why bitsandbytes cannot be used, or None if it can. If PyTorch is not loaded, checks only whether it is installed."""
    if "torch" not in sys.modules:
        return None if importlib.util.find_spec("bitsandbytes") else ImportError("it is not installed")
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return error
    return None


def _torch_backend() -> str | None:
    """``cuda`` or ``hip``, from the version file of the installed PyTorch; None for a CPU build or if PyTorch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((backend for backend in ("cuda", "hip") if re.search(rf"^{backend}\b[^=\n]*= *['\"]", text, re.MULTILINE)), None)


def _nvidia_cards() -> list[Card]:
    """Cards that the NVIDIA driver lists; empty if it lists none, or its output cannot be read."""
    return [card for _, card in _nvidia_rows()]


def _nvidia_rows() -> list[tuple[str, Card]]:
    """The cards of :func:`_nvidia_cards`, each after its UUID.

    The order is that of the PCI bus. CUDA's own default order differs on a machine with cards of different speeds: the fastest is first.
    """
    if shutil.which(_QUERY[0]) is None:
        return []
    try:
        output = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT, check=True).stdout
        rows = [[cell.strip() for cell in row] for row in csv.reader(output.splitlines()) if row]
        order = _visible_positions([(index, uuid) for index, uuid, *_ in rows], "CUDA_VISIBLE_DEVICES")
        return [
            (uuid, Card(k, name, int(free) * 2**20, float(capability) >= 8))
            for k, (_, uuid, name, free, capability) in enumerate(rows[position] for position in order)
        ]
    except (OSError, subprocess.SubprocessError, ValueError, csv.Error):
        return []


def _visible_positions(cards: list[tuple[str, str]], variable: str) -> list[int]:
    """Positions of the cards that an environment variable selects, in its order; all of them if it is not set.

    As in CUDA, the selection ends at the first entry that does not match exactly one card, and a repeated card selects none at all.

    Args:
        cards: index and UUID of each card. An entry of the variable is an index or the start of a UUID.
        variable: name of the environment variable, such as ``CUDA_VISIBLE_DEVICES``.
    """
    selection = os.environ.get(variable)
    if selection is None:
        return list(range(len(cards)))
    order: list[int] = []
    for entry in selection.split(","):
        entry = entry.strip()
        matches = [k for k, (index, uuid) in enumerate(cards) if entry and (entry == index or uuid.startswith(entry))]
        if len(matches) != 1:
            break
        if matches[0] in order:
            return []
        order += matches
    return order


def _amd_cards() -> list[Card]:
    """Cards that the kernel's amdgpu driver lists. Every card that ROCm supports computes in bf16."""
    return [card for _, card in _amd_rows()]


def _amd_rows() -> list[tuple[str, Card]]:
    """The cards of :func:`_amd_cards`, each after its number for ``HIP_VISIBLE_DEVICES``.

    ROCm applies ``ROCR_VISIBLE_DEVICES`` first, then ``HIP_VISIBLE_DEVICES`` or, without that, ``CUDA_VISIBLE_DEVICES``. Only indices are
    supported in them.
    """
    free: list[int] = []
    totals = _AMD_DEVICES.glob("card[0-9]*/device/mem_info_vram_total")
    for total in sorted(totals, key=lambda path: (len(path.parts[-3]), path.parts[-3])):  # card2 before card10
        try:
            free.append(int(total.read_text()) - int(total.with_name("mem_info_vram_used").read_text()))
        except (OSError, ValueError):
            continue
    positions = list[int]()
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"):
        positions = _visible_positions([(str(k), "") for k in range(len(free))], variable)
        free = [free[k] for k in positions]
    return [(str(position), Card(k, "an AMD card", size, True)) for k, (position, size) in enumerate(zip(positions, free, strict=True))]
