"""What people see: what is active, progress, errors; everything on stderr, but for JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.config import RunConfig
from ..core.errors import ImagicError, ImagicWarning

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..core.runtime import Runtime
    from ..memory.plan import Plan
    from ..training.stage import StepReport

Value = TypeVar("Value")
err = Console(stderr=True, emoji=False)
out = Console(emoji=False)


_LONGEST = 2000  # characters of one text that a terminal is given


def plain(text: object) -> str:
    """Text from anywhere, for a terminal: neither markup, nor control characters, nor those that turn the direction of writing work."""
    told = str(text)
    more = f"... ({len(told) - _LONGEST} characters more)" if len(told) > _LONGEST else ""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in told[:_LONGEST]) + more)


def print_active_settings(runtime: Runtime, run: RunConfig, why: str, processes: int, size: int | None) -> None:
    """Preset, device, precision and levers, each with its reason.

    Args:
        size: of the adapter, in bytes.
    """
    tune = run.tune
    how = f"LoRA, rank {tune.rank}, {tune.targets}" if tune.mode == "lora" else f"full, {run.memory.master_weights} master weights"
    side = f"{run.resolution} pixels squared" if run.resolution else "the base's own"
    rows = {
        "preset": f"{run.preset} ({why})",
        **runtime.reasons,
        "base": run.base,
        "resolution": side,
        "tuning": how,
        **({"adapter": f"about {size / 1e6:.2f} MB"} if size else {}),
        "processes": str(processes),
    }
    for name, stage in {"embed": run.embed, "tune": tune}.items():
        rows[name] = f"{stage.steps} steps of batch {stage.batch_size} at rate {stage.learning_rate:g}"
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", plain(value))
    err.print(table)


def print_plan(plan: Plan, run: RunConfig, why: str) -> None:
    """A row for every stage: where its memory goes."""
    assumed = plan.assumed
    where = "a card" if assumed.device == "cuda" else "the CPU"
    size = f"{run.resolution} pixels squared" if run.resolution else "the base's own resolution"
    table = Table("MiB", "weights", "gradients", "optimizer", "activations", "allowance", "peak")
    heading = f"{run.base}, mode {run.tune.mode}, preset {run.preset} ({why}), {size}, {assumed.dtype} on {where}"
    out.print(plain(heading), highlight=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, peak in plan.stages.items():
        parts = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.fragmentation + plan.context, plan.needs(name))
        style = "bold" if name == plan.worst else None
        table.add_row(name, *(f"{size / 2**20:,.0f}" for size in parts), style=style)
    out.print(table)
    sizes = {"host memory": plan.host, "adapter": plan.adapter, "checkpoint": plan.checkpoint}
    show_progress = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes.items())
    out.print(
        f"Peak [bold]{plan.peak_bytes / 2**30:.2f} GiB[/] in stage {plan.worst}. {show_progress[0].upper() + show_progress[1:]}.",
        highlight=False,
    )
    allowed = "the CUDA context" if assumed.device == "cuda" else "Python and its libraries"
    if not plan.fits(run.preset):
        err.print(f"[yellow]Warning:[/] more than the card that preset {run.preset} is for", highlight=False)
    out.print(f"Predicted, not measured; the allowance is for {allowed} and for fragmentation.", highlight=False)


def show_progress(steps: Generator[StepReport, None, Adapter | None], run: RunConfig) -> Adapter | None:
    """Runs a fit with a progress bar; where nobody watches, with a line every tenth of a stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err, disable=not err.is_terminal
    ) as bar:
        totals = {"embed": run.embed.steps, "tune": run.tune.steps}
        tasks = {stage: bar.add_task(stage, total=total, loss="", start=False) for stage, total in totals.items()}
        begun: set[str] = set()
        while True:
            try:
                report = next(steps)
            except StopIteration as done:
                return done.value
            if report.stage not in begun:
                begun.add(report.stage)
                bar.start_task(tasks[report.stage])
                bar.update(tasks[report.stage], completed=report.step - 1)
            tenth = report.step % max(1, report.steps // 10) == 0
            bar.update(tasks[report.stage], completed=report.step)
            if tenth:
                loss = f"{report.loss.item():.4f}"
                bar.update(tasks[report.stage], loss=loss)
                if not err.is_terminal:
                    err.print(f"{report.stage} {report.step}/{report.steps} loss {loss}", highlight=False)


def progress(items: Iterable[Value], total: int, what: str) -> Iterable[Value]:
    """The items as they come, with a progress bar."""
    from rich.progress import track

    return track(items, what, total=total, console=err, disable=not err.is_terminal)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


def print_warnings() -> None:
    """Our own warnings in one line, and none of the libraries'."""

    def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, ImagicWarning):
            err.print(f"[yellow]Warning:[/] {plain(message)}")

    warnings.showwarning = show_warning


def print_interrupted(told: str, command: str | None, tokens: Sequence[str]) -> int:
    """Says how to go on, in JSON too where that was asked for; gives the exit code.

    Args:
        command: that goes on; None where there is nothing to go on from.
    """
    if "--json" in tokens:
        print_json({"interrupted": told, "resume": command})
    err.print(f"[yellow]Interrupted:[/] {plain(told)}", highlight=False)
    if command:
        err.print("Go on with:")
        err.print(f"  {plain(command)}", highlight=False, soft_wrap=True)
    return 130


def print_error(error: ImagicError, tokens: Sequence[str]) -> int:
    """Says what was wrong, in JSON too where that was asked for; gives the exit code."""
    if "--json" in tokens:
        print_json({"error": {"got": error.got, "expected": error.expected, "remedy": error.remedy}})
    err.print(f"[red]Error:[/] {plain(error.got)}", highlight=False)
    err.print(f"  expected: {plain(error.expected)}", highlight=False)
    err.print(f"  what to do: {plain(error.remedy)}", highlight=False)
    return 2
