"""The command ``doctor``."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from ...core.choices import choose_runtime
from ...core.device_config import MemoryConfig
from ...core.environment import LIBRARIES
from ...core.errors import ImagicError
from ...core.machine import find_card, free_host_memory
from ..console import out, plain, print_json
from ..options import Flag, Json


def doctor(
    *,
    measure: Flag = False,
    base: str | None = None,
    minutes: float | None = None,
    offline: Flag = False,
    random_weights: Flag = False,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """Report on this machine: device, precision, free memory, versions of the libraries, and what is missing.

    With --measure, it runs a few real steps of each stage of a fit, in modes lora and full, at each preset that is predicted to fit. The
    report has peak memory and speed beside the predictions, as JSON and Markdown. It names no path and no user: please post it.

        imagic-lora doctor --measure --base sd15 --minutes 10

    Parameters
    ----------
    measure
        Measure this machine. After Ctrl-C, what was measured is kept.
    base
        Base to measure: a name, folder, file or hub id. Its weights are downloaded if they are not in the cache, before the time starts.
        Default: sd15 on a card, critters on a CPU.
    minutes
        Time that the measurement may take. What is not measured by then is left out. Default: 10.
    offline
        Take the weights from the cache only.
    random_weights
        Measure with random weights, which take as much memory and time as the base's own and need no download.
    out_dir
        Folder for the report, BASE.json and BASE.md. Default: outputs/doctor.
    """
    given = {"--base": base, "--minutes": minutes, "--offline": offline, "--random-weights": random_weights, "--out": out_dir}
    if measure:
        from ..measuring import measure_machine

        chosen = base or ("sd15" if find_card() else "critters")
        minutes = 10 if minutes is None else minutes
        measure_machine(chosen, minutes, out_dir or Path("outputs/doctor"), offline, random_weights, as_json)
        return
    if useless := [flag for flag, value in given.items() if value]:
        raise ImagicError(f"{useless[0]} without --measure", "both, or neither", f"add --measure, or leave out {useless[0]}")
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
