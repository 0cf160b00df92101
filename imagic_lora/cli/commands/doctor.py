"""The command ``doctor``."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from ...core.choices import choose_runtime
from ...core.config import MemoryConfig
from ...core.environment import LIBRARIES
from ...core.machine import find_card, free_host_memory
from ..console import out, plain, print_json
from ..options import Json


def doctor(*, as_json: Json = False) -> None:
    """Report on this machine: device, precision, free memory, versions of the libraries, and what is missing."""
    report = examine()
    if as_json:
        print_json(report)
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for group, values in report.items():
        for key, value in values.items():
            table.add_row(f"[dim]{group}[/]", key, plain(value))
    out.print(table)


def examine() -> dict[str, dict[str, str]]:
    """Returns the report by group: ``system``, ``choices`` (with their reasons), ``libraries`` and ``missing``."""
    card = find_card()
    system = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "free memory": f"{free_host_memory() / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
    missing = {}
    if card:
        system["free memory on the card"] = f"{card.free / 2**30:.1f} GiB"
    else:
        missing["CUDA"] = "a fit with Stable Diffusion takes hours on a CPU; a fit with the base critters takes seconds"
    if importlib.util.find_spec("xformers") is None:
        missing["xformers"] = "optional: pip install 'imagic-lora[xformers]' for --attention xformers (CUDA)"
    if importlib.util.find_spec("tensorboard") is None:
        missing["tensorboard"] = "optional: pip install 'imagic-lora[tensorboard]' for fit --tracker tensorboard"
    choices = choose_runtime(MemoryConfig(), card).reasons
    return {"system": system, "choices": choices, "libraries": {name: _version(name) for name in LIBRARIES}, "missing": missing}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
