"""``doctor --measure``: the runs that fit this machine, one after another, with progress, a time budget and a report that grows."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from ..adapters.durable import write_text
from ..adapters.writing import check_outputs
from ..bases.loading.known import known_base, local_path
from ..bench.machine.process import Failed, located, measured
from ..bench.machine.report import MachineReport
from ..bench.machine.runs import STAGES, MachineRun, runs_of
from ..core.errors import ImagicError
from ..core.machine import Card, find_card, free_host_memory
from ..core.text import json_text
from .console import err, plain, print_json, progress
from .interrupts import Interrupts

_LEAST, _MOST = 1.0, 15.0  # seconds of a stage


def measure_machine(base: str, minutes: float, folder: Path, offline: bool, random_weights: bool, as_json: bool) -> None:
    """Measures a base on this machine, and writes the report after every stage.

    Args:
        base: name, folder, file or hub id of the base.
        minutes: after which what is not measured yet is left out. A download is not counted.
        folder: for the report.
        offline: whether only the cache of the hub is used.
        random_weights: whether the base has random weights.
        as_json: whether the report is printed as JSON.

    Raises:
        ImagicError: the base cannot be read, no run fits the machine, or the report cannot be written.
    """
    if not 0 < minutes <= 24 * 60:  # NaN is not either
        raise ImagicError(f"--minutes {minutes:g}", "more than 0 and at most 1440 minutes", "choose another value for --minutes")
    card = find_card()
    free = card.free if card else free_host_memory()
    files = [folder / f"{_public_name(base)}.{suffix}" for suffix in ("json", "md")]
    check_outputs(folder, [file.name for file in files])
    runs = _runs(base, card, free, random_weights, offline)
    report = MachineReport(_public_name(base), random_weights, runs)
    _write(report, files)

    def kept() -> str:
        _interrupted(report)
        _write(report, files)
        return f"{report.count} measured stages are in {files[0]} and {files[1]}"

    total, start = _total(report), time.monotonic()
    with Interrupts(kept), closing(_measured(report, minutes, free, offline)) as stages:
        for done, (k, stage) in enumerate(progress(stages, total, "stages"), 1):
            _write(report, files)
            if stage:
                taken = time.monotonic() - start
                left = min(taken / done * (total - done), max(0.0, 60 * minutes - taken))
                _print_stage(report, k, stage, f"{done} of {total}, about {left:.0f} s left")
    _write(report, files)
    if as_json:
        print_json(report.to_json() | {"files": [str(file) for file in files]})
        return
    for k, reason in sorted(report.reasons.items()):
        run = report.runs[k].run
        err.print(f"Not measured: {run.tune.mode}, preset {run.preset}: {plain(reason)}", highlight=False)
    err.print(f"[green]Wrote[/] {plain(files[0])} and {plain(files[1])}: no path and no name of a user is in them", highlight=False)


def _public_name(base: str) -> str:
    """The name of a named base, or what a base is, for the report and its files."""
    known = known_base(base)
    return known.built_in or (known.name if known.entry else "own-base")


def _runs(base: str, card: Card | None, free: int, random_weights: bool, offline: bool) -> list[MachineRun]:
    """Returns the runs of a base whose files are on this machine. Those of a hub id are downloaded, after the check that a run fits.

    Raises:
        ImagicError: no run fits; the files are neither here nor can they be downloaded.
    """
    known = known_base(base)
    hub_id = known.entry is None and not local_path(base) and base.count("/") == 1
    if hub_id:  # its configs are among the files
        base = _located(base, offline)
    runs = runs_of(base, card, free)
    if random_weights and runs[0].run.embed.space == "input":
        raise ImagicError(f"--random-weights with base {base}", "a base that is trained at its embeddings", "leave out --random-weights")
    if all(one.left_out for one in runs):
        got = f"no preset of base {base} can be measured: {runs[-1].left_out}"
        raise ImagicError(got, "memory for one of them", "close other programs, or choose another --base")
    if not hub_id and not random_weights and not local_path(known.source):
        _located(base, offline)
    return runs


def _located(base: str, offline: bool) -> str:
    """Returns the path of a base on the hub, which is downloaded if it is not in the cache; raises ImagicError if it cannot be."""
    if not offline:
        err.print(f"Looking for the weights of {plain(base)}, which are downloaded if they are not in the cache", highlight=False)
    try:
        return located(base, offline)
    except ImagicError as error:
        expected = "a base in the cache of the hub, or a folder" if offline else error.expected
        remedy = "leave out --offline to download it" if offline else error.remedy
        if known_base(base).entry:
            remedy += "; or use --random-weights, which take as much memory and time"
        raise ImagicError(error.got, expected, remedy) from error


def _total(report: MachineReport) -> int:
    return len(STAGES) * (len(report.runs) - len(report.reasons))


def _measured(report: MachineReport, minutes: float, free: int, offline: bool) -> Generator[tuple[int, str | None], None, None]:
    """Fills the report. Yields the index of the run and the stage, or None for each stage that is not measured."""
    end = time.monotonic() + 60 * minutes
    waiting = [k for k in range(len(report.runs)) if k not in report.reasons]
    for place, k in enumerate(waiting):
        left = len(STAGES) * (len(waiting) - place)
        seconds = min(_MOST, max(_LEAST, (end - time.monotonic()) / (3 * left)))  # two thirds of the time are for loading
        for stage in _measured_run(report, k, report.runs[k], seconds, end, free, offline):
            yield k, stage
        for _ in range(len(STAGES) - len(report.stages[k])):
            yield k, None


def _measured_run(report: MachineReport, k: int, one: MachineRun, seconds: float, end: float, free: int, offline: bool) -> Iterator[str]:
    """Measures one run, or says in the report why not. Yields the names of its stages."""
    if time.monotonic() >= end:
        report.reasons[k] = "the time was up"
        return
    messages = measured(one.run, seconds, end, free, report.random_weights, offline=offline)
    try:
        for message in messages:
            report.card = message.get("card", report.card)
            report.threads = message.get("threads", report.threads)
            if "time" in message:
                report.reasons[k] = "the time was up"
            elif "out_of_memory" in message:
                report.reasons[k] = "out of memory"
            elif "measured" in message:
                stage = message["measured"]
                report.stages[k][stage["stage"]] = stage
                yield stage["stage"]
    except Failed as error:
        report.reasons[k] = "failed"
        err.print(f"[yellow]Failed:[/] {one.run.tune.mode}, preset {one.run.preset}\n{plain(error)}", highlight=False)
    finally:
        messages.close()


def _interrupted(report: MachineReport) -> None:
    for k in range(len(report.runs)):
        if k not in report.reasons and len(report.stages[k]) < len(STAGES):
            report.reasons[k] = "interrupted"


def _print_stage(report: MachineReport, k: int, stage: str, where: str) -> None:
    run = report.runs[k].run
    tensors, predicted, _, process, _, speed = report.cells(k, stage)
    beside = f" (predicted {predicted})" if predicted else ""
    sizes = f"tensors {tensors} MiB{beside}, process {process} MiB"
    err.print(f"{run.tune.mode}, preset {run.preset}, {stage}: {sizes}{', ' + speed if speed else ''} ({where})", highlight=False)


def _write(report: MachineReport, files: list[Path]) -> None:
    write_text(files[0], json_text(report.to_json()))
    write_text(files[1], report.to_markdown())
