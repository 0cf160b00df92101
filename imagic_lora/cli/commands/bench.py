"""The commands that measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...core.errors import ImagicError
from ..console import err, out, plain, print_json, progress
from ..options import Json

if TYPE_CHECKING:
    from ...bench.page import Table as Cells

bench = App(name="bench", help="Measure editing where the true edit is known.")


@bench.command
def critters(
    *,
    cases: int = 60,
    seed: int = 7,
    methods: str | None = None,
    workers: int = 1,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """CritterBench: edits of pictures whose true edit is known, scored by a judge that no method has seen.

    What an earlier run with the same folder did is not done again. Writes summary.json and index.html.

    Parameters
    ----------
    cases
        Number of edits; half of them change the pose.
    seed
        Of the cases. Figures are claimed on seed 7; defaults were chosen on others.
    methods
        Some of bounds, prompt-only, sdedit, imagic-lora, imagic-full, reference, reference-retuned, with commas; all where not given.
    workers
        Processes that share the CPU.
    out_dir
        Folder for pictures and results; outputs/bench/critters-SEED where not given.
    """
    from ...bench.catalogue import chosen
    from ...bench.critters import Bench
    from ...bench.page import tables, write_page
    from ...bench.summary import summarise

    for name, value, least in (("--cases", cases, 1), ("--seed", seed, 0), ("--workers", workers, 1)):
        if value < least:
            raise ImagicError(f"{name} {value}", f"a whole number from {least}", f"choose another {name}")
    from ...bases.loading.progress import hide_progress_bars

    hide_progress_bars()
    run = Bench(seed, cases, chosen(methods), out_dir or Path("outputs/bench") / f"critters-{seed}")
    run.out.mkdir(parents=True, exist_ok=True)
    results = list(progress(run.results(workers), cases * len(run.methods), "cases x methods"))
    summary = summarise(run, results)
    page = write_page(run, results, summary)
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(summary | {"page": str(page)})
        return
    for title, cells in tables(summary).items():
        out.print(_table(title, cells))
    if summary["failed"]:
        err.print(f"[yellow]{summary['failed']} failed[/]; why is in {plain(page)}")
    err.print(f"[green]Look at[/] {plain(page)}")


def _table(title: str, cells: Cells) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for k, name in enumerate(cells.columns):
        table.add_column(name, justify="right" if k else "left", no_wrap=k == 0)
    for row in cells.rows:
        table.add_row(*map(plain, row))
    return table
