"""What this machine has: its card, free memory, whether bitsandbytes works. No torch here: where it is not loaded, the driver is asked."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.free,compute_cap", "--format=csv,noheader,nounits")
_AMD = Path("/sys/class/drm")
_SECONDS = 5  # after which a driver that does not answer counts as none


@dataclass(frozen=True)
class Card:
    """A CUDA device.

    Args:
        index: as PyTorch counts.
        free: bytes.
        native_bf16: its compute capability is 8.0 or higher.
    """

    index: int
    name: str
    free: int
    native_bf16: bool


def find_card(index: int | None = None) -> Card | None:
    """The card of that index (PyTorch's current one by default); None where PyTorch has none to use.

    PyTorch is asked where it is loaded. Importing it takes seconds, so otherwise the driver is asked, as far as the installed build of
    PyTorch and ``CUDA_VISIBLE_DEVICES`` allow.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        cards = [] if _built_for() is None else _nvidia() if _built_for() == "cuda" else _amd()
        return next((card for card in cards if card.index == (index or 0)), None)
    if not torch.cuda.is_available():
        return None
    place: int = torch.cuda.current_device() if index is None else index
    native = torch.cuda.get_device_capability(place) >= (8, 0)
    return Card(place, torch.cuda.get_device_name(place), torch.cuda.mem_get_info(place)[0], native)


def free_host_memory() -> int:
    """Bytes of host memory that can be had."""
    return psutil.virtual_memory().available


def bitsandbytes_error() -> Exception | None:
    """Why bitsandbytes cannot be used; None where it can. Where PyTorch is not loaded, only whether it is installed is looked at."""
    if "torch" not in sys.modules:
        return None if importlib.util.find_spec("bitsandbytes") else ImportError("it is not installed")
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return error
    return None


def _built_for() -> str | None:
    """``cuda`` or ``hip``, by the version file of the installed PyTorch; None for a CPU build, or none at all."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((kind for kind in ("cuda", "hip") if re.search(rf"^{kind}\b[^=\n]*= *['\"]", text, re.MULTILINE)), None)


def _nvidia() -> list[Card]:
    if shutil.which(_QUERY[0]) is None:
        return []
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
        rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines())]
        order = _visible([(row[0], row[1]) for row in rows])
        return [
            Card(k, name, int(free) * 2**20, float(capability) >= 8)
            for k, (_, _, name, free, capability) in enumerate(rows[place] for place in order)
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _visible(cards: list[tuple[str, str]]) -> list[int]:
    """Places of the cards that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; CUDA stops at the first entry that is no card.

    Args:
        cards: index and UUID of each.
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return list(range(len(cards)))
    order: list[int] = []
    for entry in told.split(","):
        entry = entry.strip()
        place = next((k for k, (index, uuid) in enumerate(cards) if entry and (entry == index or uuid.startswith(entry))), None)
        if place is None:
            break
        order.append(place)
    return order


def _amd() -> list[Card]:
    """Cards that the kernel's amdgpu driver lists; all that ROCm supports compute in bf16."""
    cards = []
    for total in sorted(_AMD.glob("card[0-9]*/device/mem_info_vram_total")):
        try:
            free = int(total.read_text()) - int(total.with_name("mem_info_vram_used").read_text())
        except (OSError, ValueError):
            continue
        cards.append(Card(len(cards), "an AMD card", free, True))
    return cards
