"""The report of a measurement, as JSON and Markdown. It names no path, no user and no host: it can be published."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ...core.choices import levers
from ...core.environment import LIBRARIES
from .runs import STAGES, MachineRun


@dataclass
class MachineReport:
    """What was measured so far.

    Args:
        base: the name that the report gives the base.
        random_weights: whether the base has random weights.
        runs: the runs, in their order.
        stages: the measured stages of each run, by their names.
        reasons: why stages of a run are missing, by the index of the run.
        card: what the process found: ``name``, ``bytes``, ``cuda``; None on the CPU.
        threads: threads of PyTorch.
    """

    base: str
    random_weights: bool
    runs: list[MachineRun]
    stages: list[dict[str, dict[str, Any]]] = field(init=False)
    reasons: dict[int, str] = field(init=False)
    card: dict[str, Any] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        self.stages = [{} for _ in self.runs]
        self.reasons = {k: one.left_out for k, one in enumerate(self.runs) if one.left_out}

    @property
    def count(self) -> int:
        """Number of measured stages."""
        return sum(map(len, self.stages))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "version": 1,
            "date": datetime.now(UTC).date().isoformat(),
            "base": self.base,
            "random_weights": self.random_weights,
            "machine": self._machine(),
            "libraries": {"imagic-lora": version("imagic-lora"), **{name: _version(name) for name in LIBRARIES}},
            "runs": [self._run(k) for k in range(len(self.runs))],
        }

    def _machine(self) -> dict[str, Any]:
        return {
            "card": self.card,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "host_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        }

    def _run(self, k: int) -> dict[str, Any]:
        one = self.runs[k]
        run, assumed = one.run, one.plan.assumed if one.plan else None
        settings = {
            "mode": run.tune.mode,
            "preset": run.preset,
            "resolution": run.resolution,
            "precision": assumed.dtype if assumed else run.memory.dtype,
            "optimizer": assumed.optimizer if assumed else run.memory.optimizer,
            "memory_levers": levers(run.memory),
            "batch": {"embed": run.embed.batch_size, "tune": run.tune.batch_size, "generate": run.edit.batch_size},
            "sampling_steps": run.edit.steps,
        }
        return {**settings, "stages": {name: self._stage(k, name) for name in self.stages[k]}, "not_measured": self.reasons.get(k)}

    def _stage(self, k: int, name: str) -> dict[str, Any]:
        found, predicted = self.stages[k][name], self.runs[k].predicted(name)
        seconds = found["seconds"]
        speed = {} if seconds is None else {_rate(name): 1 / seconds, "timed": found["count"], "estimated": found["estimated"]}
        memory = {kind: found[kind] for kind in ("allocated", "reserved", "process")}
        return {**memory, "predicted": predicted and predicted._asdict(), **speed}

    def to_markdown(self) -> str:
        """The report as a Markdown text with one table."""
        about = self.to_json()
        machine = about["machine"]
        card = f"{self.card['name']}, {self.card['bytes'] / 2**30:.0f} GiB, CUDA {self.card['cuda']}" if self.card else "no card"
        weights = " with random weights" if self.random_weights else ""
        lines = [f"# imagic-lora {about['libraries']['imagic-lora']}: {self.base}{weights}, measured {about['date']}", ""]
        lines += [
            f"{card}; {machine['processor']}, {machine['cores']} cores, {machine['host_bytes'] / 2**30:.0f} GiB; {machine['system']}."
        ]
        lines += [", ".join(f"{name} {number}" for name, number in about["libraries"].items() if name != "imagic-lora") + ".", ""]
        lines += [
            "Peak memory in MiB. Tensors are what PyTorch allocates; process is the whole process, on the card or in host memory.",
            "",
        ]
        columns = ("mode", "preset", "stage", "tensors", "predicted", "reserved", "process", "predicted", "speed")
        lines += [_row(columns), _row(["---"] * 3 + ["---:"] * 6), *(_row(cells) for cells in self._rows())]
        missing = [f"- {self.runs[k].run.tune.mode}, {self.runs[k].run.preset}: {reason}" for k, reason in sorted(self.reasons.items())]
        lines += ["", "Not measured, or not all stages:", "", *missing] if missing else []
        return "\n".join(lines) + "\n"

    def _rows(self) -> Iterator[list[str]]:
        for k, one in enumerate(self.runs):
            for name in (name for name in STAGES if name in self.stages[k]):
                yield [one.run.tune.mode, one.run.preset, name, *self.cells(k, name)]

    def cells(self, k: int, name: str) -> list[str]:
        """The figures of a stage as text: tensors, predicted, reserved, process, predicted, speed."""
        found = self._stage(k, name)
        predicted = found["predicted"] or {"tensors": None, "process": None}
        sizes = (found["allocated"], predicted["tensors"], found["reserved"], found["process"], predicted["process"])
        rate = found.get(_rate(name))
        unit = _rate(name).split("_")[0]
        about = "about " if found.get("estimated") else ""
        speed = "" if rate is None else f"{about}{rate:.2f} {unit}/s" if rate >= 0.1 else f"{about}{1 / rate:.0f} s each"
        return ["" if size is None else f"{size / 2**20:,.0f}" for size in sizes] + [speed]


def _rate(stage: str) -> str:
    return "images_per_second" if stage == "generate" else "steps_per_second"


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
