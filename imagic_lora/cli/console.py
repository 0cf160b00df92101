"""Terminal output: tables, progress, warnings and errors.

The answer of a command goes to stdout, as tables or as JSON. Everything else goes to stderr.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.config import RunConfig
from ..core.errors import ImagicError, ImagicWarning
from .listening import listener

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..bench.table import Table as Cells
    from ..core.runtime import Runtime
    from ..memory.plan import Plan
    from ..training.stage import StepReport

Value = TypeVar("Value")


class _Console(Console):
    """A console whose BrokenPipeError is that of ``print``. That of rich ends the program with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich in place of raising the error."""
        raise BrokenPipeError


err = _Console(stderr=True, emoji=False)
out = _Console(emoji=False)


_MAX_LENGTH = 2000  # characters of one text; the rest is cut


def plain(text: object) -> str:
    """Returns :func:`printable` text with the markup of rich escaped."""
    return escape(printable(text))


def printable(text: object) -> str:
    """Returns text from an untrusted source as it can be printed on a terminal.

    Control characters and characters that change the direction of writing are escaped. Long text is cut.
    """
    full = str(text)
    ending = f"... ({len(full) - _MAX_LENGTH} more characters)" if len(full) > _MAX_LENGTH else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in full[:_MAX_LENGTH]) + ending


def print_active_settings(runtime: Runtime, run: RunConfig, why: str, processes: int, size: int | None) -> None:
    """Prints the settings of a run: preset, device, precision and memory levers, each with its reason.

    Args:
        runtime: the device and precision of the run.
        run: its settings.
        why: the reason for its preset.
        processes: number of processes.
        size: predicted size of the adapter in bytes; None if it is not known.
    """
    tune = run.tune
    tuning = {
        "lora": f"LoRA, rank {tune.rank}, {tune.targets}",
        "full": f"full, {run.memory.master_weights} master weights",
        "embedding": "none, the embedding alone is trained",
    }[tune.mode]
    if run.method == "textual-inversion":
        tuning = f"none, {run.inversion.vectors} vector{'s' if run.inversion.vectors > 1 else ''} of the new word are trained"
    resolution = f"{run.resolution} x {run.resolution} pixels" if run.resolution else "that of the base"
    rows = {
        "preset": f"{run.preset} ({why})",
        **runtime.reasons,
        "base": run.base,
        **({"method": run.method} if run.method != "imagic" else {}),
        **({"class pictures": f"{run.dreambooth.class_pictures}, weight {run.dreambooth.prior_weight:g}"} if run.prior else {}),
        "resolution": resolution,
        "tuning": tuning,
        **({"adapter": f"about {size / 1e6:.2f} MB"} if size else {}),
        "monitoring": _monitoring_text(run),
        "processes": str(processes),
    }
    for name, stage in run.stages.items():
        rows[name] = f"{stage.steps} steps, batch size {stage.batch_size}, learning rate {stage.learning_rate:g}"
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", plain(value))
    err.print(table)


def _monitoring_text(run: RunConfig) -> str:
    """What a fit evaluates and shows while it trains, in words."""
    settings = run.monitoring
    parts = [f"relative loss every {settings.convergence_every} steps"] if settings.convergence_every else []
    if settings.early_stop != "off":
        stages = {"both": "both stages", "embed": "stage embed", "tune": "stage tune"}[settings.early_stop]
        parts.append(f"early stop of {stages} after {settings.patience} evaluations without {settings.min_improvement:g} less")
    if run.previews_every:
        parts.append(f"previews every {run.previews_every} steps of stage tune")
    return ", ".join(parts) or "off"


def print_plan(plan: Plan, run: RunConfig, why: str) -> None:
    """Prints the predicted memory of a run, one row for each stage.

    Args:
        plan: the prediction.
        run: the settings of the run.
        why: the reason for its preset.
    """
    assumed = plan.assumed
    device = "a CUDA card" if assumed.device == "cuda" else "the CPU"
    resolution = f"{run.resolution} x {run.resolution} pixels" if run.resolution else "the resolution of the base"
    table = Table("MiB", "weights", "gradients", "optimizer", "activations", "allowance", "peak")
    what = f"mode {run.tune.mode}" if run.method == "imagic" else f"{run.method}, mode {run.tune.mode}"
    what = run.method if run.method == "textual-inversion" else what
    heading = f"{run.base}, {what}, preset {run.preset} ({why}), {resolution}, {assumed.dtype} on {device}"
    out.print(plain(heading), highlight=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, peak in plan.stages.items():
        parts = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.fragmentation + plan.context, plan.needs(name))
        style = "bold" if name == plan.worst else None
        table.add_row(name, *(f"{size / 2**20:,.0f}" for size in parts), style=style)
    out.print(table)
    sizes = {"host memory": plan.host, "adapter": plan.adapter, "checkpoint": plan.checkpoint}
    totals = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes.items())
    out.print(
        f"Peak [bold]{plan.peak_bytes / 2**30:.2f} GiB[/] in stage {plan.worst}. {totals[0].upper() + totals[1:]}.",
        highlight=False,
    )
    overhead = "the CUDA context" if assumed.device == "cuda" else "Python and its libraries"
    if not plan.fits(run.preset):
        has = "is free on this machine" if assumed.device == "cpu" else f"the card of preset {run.preset} has"
        err.print(f"[yellow]Warning:[/] the peak is more than {has}", highlight=False)
    out.print(f"Predicted, not measured. The allowance covers {overhead} and fragmentation.", highlight=False)


def show_progress(steps: Generator[StepReport, None, Adapter | None], run: RunConfig) -> Adapter | None:
    """Runs a fit to its end and shows its progress: a bar on a terminal, else a line after every tenth of a stage.

    Args:
        steps: the running fit.
        run: its settings.

    Returns:
        The adapter; None if the fit returns none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err, disable=not err.is_terminal
    ) as bar:
        totals = ({"class": run.dreambooth.class_pictures} if run.prior else {}) | {name: stage.steps for name, stage in run.stages.items()}
        tasks = {name: bar.add_task(name, total=total, loss="", start=False) for name, total in totals.items()}
        started: set[str] = set()
        relative = ""
        while True:
            try:
                report = next(steps)
            except StopIteration as done:
                return done.value
            listener().step(report, run)
            if report.stage not in started:
                started.add(report.stage)
                relative = ""
                bar.start_task(tasks[report.stage])
                bar.update(tasks[report.stage], completed=report.step - 1)
            show_loss = report.step % max(1, report.steps // 10) == 0 or report.early_stop
            bar.update(tasks[report.stage], completed=report.step, total=report.step if report.early_stop else report.steps)
            relative = relative if report.relative_loss is None else f", relative {report.relative_loss:.2f}"
            if report.loss is None:
                if show_loss and not err.is_terminal:
                    err.print(f"{report.stage} pictures {report.step}/{report.steps}", highlight=False)
            elif show_loss:
                loss = f"{report.loss.item():.4f}{relative}"
                bar.update(tasks[report.stage], loss=loss)
                if not err.is_terminal:
                    err.print(f"{report.stage} {report.step}/{report.steps} loss {loss}", highlight=False)
            if report.preview:
                err.print(f"Previews after step {report.step}: {plain(report.preview)}", highlight=False)
            if report.early_stop:
                message = f"Stage {report.stage} ends after {report.step} of {report.steps} steps: the relative loss no longer falls"
                err.print(message, highlight=False)


def progress(items: Iterable[Value], total: int, label: str) -> Iterator[Value]:
    """Yields the items unchanged, and shows a progress bar while they are consumed.

    Args:
        items: any iterable.
        total: its number of items.
        label: text of the bar.
    """
    from rich.progress import track

    for done, item in enumerate(track(items, label, total=total, console=err, disable=not err.is_terminal), 1):
        listener().progress(label, done, total)
        yield item


def cells_table(title: str, cells: Cells) -> Table:
    """Returns a table of a benchmark for the terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(cells.columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in cells.rows:
        table.add_row(*map(plain, row))
    return table


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns, the first row as their headings; a table of rich takes five times as long for a thousand rows."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on stdout. Numbers are finite: JSON has no other."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_warnings() -> None:
    """From now on prints every :class:`ImagicWarning` in one line on stderr, and no other warning."""

    def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, ImagicWarning):
            err.print(f"[yellow]Warning:[/] {plain(message)}")

    warnings.showwarning = show_warning


def print_interrupted(message: str, command: str | None, tokens: Sequence[str]) -> int:
    """Reports an interruption and how to resume, with ``--json`` also as JSON.

    Args:
        message: what was saved.
        command: the command that resumes; None if there is nothing to resume.
        tokens: the command line without the name of the program.

    Returns:
        The exit code.
    """
    with suppress(OSError):  # the reader of the output may be gone
        if "--json" in tokens:
            print_json({"interrupted": message, "resume": command})
        err.print(f"[yellow]Interrupted:[/] {plain(message)}", highlight=False)
        if command:
            err.print("Resume with:")
            err.print(f"  {plain(command)}", highlight=False, soft_wrap=True)
    return 130


def print_error(error: ImagicError, tokens: Sequence[str]) -> int:
    """Reports an error, with ``--json`` also as JSON.

    Args:
        error: the error.
        tokens: the command line without the name of the program.

    Returns:
        The exit code.
    """
    if "--json" in tokens:
        with suppress(OSError):  # stdout may be what is full
            print_json({"error": {"got": error.got, "expected": error.expected, "remedy": error.remedy}})
    with suppress(OSError):  # or stderr
        err.print(f"[red]Error:[/] {plain(error.got)}", highlight=False)
        err.print(f"  expected: {plain(error.expected)}", highlight=False)
        err.print(f"  what to do: {plain(error.remedy)}", highlight=False)
    return 2
