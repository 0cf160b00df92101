"""The run of ``compare`` with its progress, and the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ...adapters.atomic import atomic_folder
from ...bases.base import Base
from ...core.errors import ImagicError
from ...methods.comparison.candidates import (
    Candidate,
)
from ...methods.comparison.report import files, results
from ...methods.comparison.running import Outcome, Scorer, cheapest_first, compared, whole_work
from ...methods.method import EditRequest
from ...sampling.sweeps.metrics import Metric
from ..console import err, plain
from ..interrupts import Interrupts
from ..listening import listener


class Ran(NamedTuple):
    """What came of a comparison.

    Args:
        outcomes: one for each candidate.
        stopped: the exception that ended it; None if every method had its turn. KeyboardInterrupt after Ctrl-C or SIGTERM.
    """

    outcomes: list[Outcome]
    stopped: BaseException | None


def run(base: Base, request: EditRequest, candidates: Sequence[Candidate], metrics: Sequence[Metric], budget: float | None) -> Ran:
    """Runs the methods with a bar over their passes. After an interruption or an unexpected error the remaining ones are left out.

    Args:
        base: the base.
        request: the request.
        candidates: the methods.
        metrics: scores by other models.
        budget: as for :func:`compared`.
    """
    outcomes: list[Outcome] = []
    interrupts = Interrupts()
    try:
        with interrupts:
            _run_all(base, request, candidates, metrics, budget, outcomes)
    except BaseException as error:  # the caller writes what is done, and raises it again
        # torch replaces the exception of a signal in places
        stopped = KeyboardInterrupt() if interrupts.requested else error
        why = "interrupted" if isinstance(stopped, KeyboardInterrupt) else f"the comparison ended with {type(error).__name__}"
        rest = cheapest_first(candidates)[len(outcomes) :]
        return Ran(outcomes + [Outcome(one, left_out=one.left_out or why) for one in rest], stopped)
    return Ran(outcomes, None)


def _run_all(
    base: Base,
    request: EditRequest,
    candidates: Sequence[Candidate],
    metrics: Sequence[Metric],
    budget: float | None,
    outcomes: list[Outcome],
) -> None:
    """Appends the outcome of each method to a list, in the order in which they run, and shows the progress."""
    scorer = Scorer(base, request, metrics)
    total = sum(whole_work(one) for one in candidates)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("methods", total=total)

        def count(module: object, inputs: Sequence[Tensor], output: object) -> None:
            bar.advance(task, len(inputs[0]))
            listener().progress("methods", min(bar.tasks[0].completed, total), total)

        hook = base.denoiser.register_forward_hook(count)
        try:
            done = 0
            for outcome in compared(base, request, candidates, scorer, budget):
                outcomes.append(outcome)
                one = outcome.candidate
                done += whole_work(one)
                bar.update(task, completed=done)
                if outcome.result:
                    cost = outcome.result.cost
                    err.print(f"{one.name}: {cost.seconds:.1f} s, {cost.forward + cost.backward:,} passes", highlight=False)
                elif one.method:
                    err.print(f"{one.name} is left out: {plain(outcome.left_out)}", highlight=False)
        finally:
            hook.remove()


def check_made(outcomes: Sequence[Outcome], budget: float | None) -> None:
    """Raises ImagicError if no method has made an edit.

    Args:
        outcomes: one for each candidate.
        budget: the value of ``--budget``.
    """
    if not any(outcome.result for outcome in outcomes):
        got = "no method made an edit: " + "; ".join(f"{outcome.candidate.name}: {outcome.left_out}" for outcome in outcomes)
        remedy = "choose other --methods" if budget is None else "raise --budget, or choose other --methods"
        raise ImagicError(got, "at least one edit", f"{remedy}; nothing is written")


def write(folder: Path, base: Base, request: EditRequest, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Writes all files at once.

    Args:
        folder: where to.
        base: the base.
        request: the request.
        about: what else the comparison depends on, for ``results.json``.
        outcomes: one for each candidate.

    Returns:
        The content of ``results.json``.
    """
    machine = {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "device": base.runtime.reasons["device"],
        "dtype": str(base.runtime.dtype),
    }
    summary = results(request, {**about, **machine}, outcomes)
    with atomic_folder(folder) as writer:
        for name, content in files(request, summary, outcomes):
            writer.write(name, [content])
    return summary
