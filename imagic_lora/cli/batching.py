"""The run of ``batch``: its progress, interruptions, results; called by ``commands/batch.py``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..core.errors import ImagicWarning, Stopped
from ..core.text import duration
from ..fleet.batch import Batch, grouped, run_here
from ..fleet.lists import ListError
from ..fleet.outcome import Outcome, Update
from ..fleet.table import Entry
from ..fleet.work import Work
from .console import err, plain
from .interrupts import Interrupts
from .listening import listener

Run = Callable[[Iterable[Sequence[Entry]], Work, Callable[[], bool]], Iterator[Update | Outcome]]
_SHOWN = 200  # wrong lines that are printed
_TRAINING = ("embed", "tune")


def print_problems(error: ListError) -> None:
    """Prints every wrong line of a list on a line of its own; the message of the error is one line."""
    for problem in error.problems[:_SHOWN]:
        err.print(f"[red]Wrong:[/] {plain(problem)}", highlight=False, soft_wrap=True)
    if len(error.problems) > _SHOWN:
        err.print(f"and {len(error.problems) - _SHOWN:,} more", highlight=False)


def run(batch: Batch, left: Sequence[Entry], run_groups: Run = run_here, together: int | None = 1) -> None:
    """Works on the entries that are left, with progress, and writes the contact sheet at the end.

    Args:
        batch: receives the outcomes.
        left: the entries.
        run_groups: where the work is done.
        together: most photos that are fitted together, as for :func:`~imagic_lora.fleet.batch.grouped`.

    Raises:
        KeyboardInterrupt: the run was interrupted; the message says what is stored.
        ImagicError: the run cannot go on; what is done is stored.
    """
    shown = Shown(len(batch.entries), len(batch.entries) - len(left))
    if shown.done:
        err.print(f"{shown.done} of {shown.total} photos were done or failed before", highlight=False)
    try:
        with Interrupts() as interrupts, shown:
            for item in run_groups(grouped(left, together), batch.work, interrupts.stop):
                interrupts.finish_step = run_groups is not run_here or (isinstance(item, Update) and item.stage in _TRAINING)
                if isinstance(item, Outcome):
                    batch.record(item)
                shown.show(item)
    except (KeyboardInterrupt, Stopped) as error:
        batch.write_page()
        raise KeyboardInterrupt(f"{shown.done} of {shown.total} photos are stored or failed; the same command continues") from error
    except Exception:  # whatever ended the run: the page shows what is done
        batch.write_page()
        raise
    batch.write_page()


@dataclass
class Shown:
    """The progress of a batch: a bar on a terminal, and a line for every photo elsewhere; lines of failures in both.

    Args:
        total: number of photos.
        done: number of photos that are done or failed.
    """

    total: int
    done: int
    _started: float | None = None
    _begun: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._before = self.done

    def __enter__(self) -> Shown:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        texts = TextColumn("{task.fields[left]}"), TextColumn("{task.description}")
        self._bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *texts, console=err, disable=not err.is_terminal)
        self._task = self._bar.add_task("", total=self.total, completed=self.done, left="")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def left(self) -> str:
        """The remaining time in words: the photos that are left at the mean time of those of this run.

        Photos that were begun count as done: those that are fitted together are done one right after another.
        """
        if not self._begun or self._started is None:
            return ""
        waiting = self.total - self._before - len(self._begun)
        seconds = (time.monotonic() - self._started) / len(self._begun) * max(waiting, 0)
        return f"{duration(seconds)} left" if self.total > self.done else ""

    def show(self, item: Update | Outcome) -> None:
        """Shows the progress or the outcome of a photo."""
        self._started = time.monotonic() if self._started is None else self._started  # the base is loaded
        self._begun.add(item.name if isinstance(item, Update) else item.entry.name)
        if isinstance(item, Update):
            steps = f" {item.step}/{item.steps}" if item.steps else ""
            self._bar.update(self._task, description=f"{plain(item.name)}: {item.stage}{steps}")
            return
        self.done += 1
        self._bar.update(self._task, completed=self.done, left=self.left)
        listener().progress("photos", self.done, self.total)
        for text in item.warnings:
            warnings.warn(f"{item.entry.name}: {text}", ImagicWarning, stacklevel=2)
        if item.error:
            err.print(f"[red]Failed:[/] {plain(item.entry.name)}: {plain(item.error['got'])}", highlight=False)
        elif not err.is_terminal:
            left = f", {self.left}" if self.left else ""
            err.print(f"{self.done}/{self.total} {plain(item.entry.name)}: {item.seconds:.1f} s{left}", highlight=False)
