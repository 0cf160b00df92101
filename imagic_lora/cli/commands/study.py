"""The commands of the user study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.table import Table

from ...adapters.durable import write_text
from ...adapters.writing import check_outputs, writable
from ...core.errors import ImagicError
from ...core.text import json_text
from ..console import err, out, plain, print_json, progress
from ..options import Flag, Json, Whole

if TYPE_CHECKING:
    from ...bench.study.rates import Report

STUDIES = Path("outputs/study")
"""Where studies are written, each in a folder that is named after its id."""
REPORT, CHART = "report.json", "preferences.png"

study = App(name="study", help="Ask people which of two edits is better, and evaluate their answers.")


@study.command
def make(
    results: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    methods: str,
    raters: Whole,
    questions: Whole = 20,
    seed: Whole = 0,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Write the page of a user study: raters choose between two edits of a photo (two-alternative forced choice).

    The page study.html holds everything and loads nothing. Send it to the raters, each with a number. It does not tell which method made an
    edit: that is in key.json, which stays with you.

    One question of each rater comes twice, with swapped sides. Who answers it differently is careless.

        imagic-lora study make outputs/bench/critters-11 --methods imagic-lora,sdedit-0.65 --raters 12

    Parameters
    ----------
    results
        Folders that bench or compare wrote.
    methods
        Two or more methods, separated by commas: rows of the benchmark, or methods of compare. The first is compared with each of
        the others.
    raters
        Number of raters, 1 to 1000. Each sees other questions, or other sides.
    questions
        Number of questions for each rater, the repeated one included. A rater gets fewer if there are not that many.
    seed
        Seed of questions, order and sides.
    out_dir
        Folder for study.html and key.json. Default: outputs/study/ID.
    overwrite
        Replace another study in the folder. Its answers can then no longer be evaluated.
    """
    from ...bench.study.key import KEY, PAGE, read_key
    from ...bench.study.page import data_url, make_study
    from ...bench.study.planning import LEAST, check_methods, files_of, plan_sheets, questions_of
    from ...bench.study.results import read_results

    for name, value, least, most in (("--raters", raters, 1, 1000), ("--questions", questions, LEAST, 1000), ("--seed", seed, 0, 2**63)):
        if not least <= value <= most:
            raise ImagicError(f"{name} {value}", f"a whole number from {least} to {most}", f"choose another value for {name}")
    names = [name.strip() for name in methods.split(",")]
    items = read_results(results)
    check_methods(items, names)
    files = files_of(items, names)
    images = {path: data_url(path) for path in progress(files, len(files), "images")}
    asked, left_out = questions_of(items, names, images)
    sheets = plan_sheets(len(asked), raters, questions, seed)
    made = make_study(asked, sheets, names, seed, images)
    folder = out_dir or STUDIES / made.key.study
    check_outputs(folder, (KEY, PAGE))
    if (folder / KEY).exists() and not overwrite and read_key(folder).study != made.key.study:
        raise ImagicError(f"{folder} holds another study", "an unused folder", "choose another --out, or use --overwrite")
    write_text(folder / KEY, made.key.model_dump_json(indent=1) + "\n")
    write_text(folder / PAGE, made.page)
    for sentence in left_out:
        err.print(f"Left out: {plain(sentence)}", highlight=False)
    shown, page = len(sheets[0]), folder / PAGE
    if as_json:
        summary = {"study": made.key.study, "page": str(page), "key": str(folder / KEY), "questions": len(asked)}
        print_json(summary | {"raters": raters, "questions_per_rater": shown, "left_out": left_out})
        return
    size = page.stat().st_size / 1e6
    err.print(f"{len(asked)} questions; each of {raters} raters answers {shown}, one of them twice", highlight=False)
    err.print(f"[green]Wrote[/] {plain(page)} ({size:.1f} MB), for the raters: {PAGE}#1 is the page of rater 1", highlight=False)
    err.print(f"[green]Wrote[/] {plain(folder / KEY)}, which names the methods: keep it", highlight=False)


@study.command(name="report")
def report_command(
    answers: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    folder: Annotated[Path | None, Parameter(name="--study")] = None,
    keep_careless: Flag = False,
    as_json: Json = False,
) -> None:
    """Evaluate the answers of a user study: how often the method is preferred to each other one, with 95% intervals.

    Wilson's interval takes all answers as independent. The bootstrap draws raters and photos anew, since answers of one rater, and about
    one photo, are alike; it is the one to trust. Writes report.json and the chart preferences.png into the folder of the study.

        imagic-lora study report answers-*.json

    Parameters
    ----------
    answers
        Files of answers that the page exported, one for each rater.
    folder
        Folder that study make wrote. Default: outputs/study/ID, by the id in the answers.
    keep_careless
        Count the answers of careless raters too. They are named in any case.
    """
    from ...bench.study.key import read_answers, read_key, study_of
    from ...bench.study.rates import report

    folder = folder or STUDIES / study_of(answers[0])
    key = read_key(folder)
    found = report(key, read_answers(answers, key), keep_careless)
    with writable(folder):
        write_text(folder / REPORT, json_text(found.to_json()))
        _write_chart(found, folder / CHART)
    if as_json:
        print_json(found.to_json() | {"report": str(folder / REPORT), "chart": str(folder / CHART)})
        return
    out.print(_table(found))
    counted = len(found.raters) - (0 if found.kept else len(found.careless))
    out.print(
        f"{counted} of {len(found.raters)} raters count. The left edit was chosen in {found.left:.0%} of the answers.", highlight=False
    )
    if found.careless:
        numbers = ", ".join(map(str, found.careless))
        err.print(f"[yellow]Careless:[/] rater {numbers}; {'counted' if found.kept else 'left out'}", highlight=False)
    err.print(f"[green]Wrote[/] {plain(folder / REPORT)} and {plain(folder / CHART)}", highlight=False)


def _table(found: Report) -> Table:
    method = found.key.methods[0]
    table = Table(f"{plain(method)} preferred to", "answers", "%", "Wilson", "bootstrap")
    for column in table.columns[1:]:
        column.justify = "right"
    for other, rate in found.rates.items():
        cells = (
            ["0", "-", "-", "-"]
            if rate is None
            else [str(rate.answers), f"{100 * rate.rate:.0f}", _interval(rate.wilson), _interval(rate.bootstrap)]
        )
        table.add_row(plain(other), *cells)
    return table


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}"


def _write_chart(found: Report, path: Path) -> None:
    """Draws the chart of the paper's Figure 8: a bar for each method that is compared with."""
    from ...photos.bars import Bar, bars
    from ...photos.png import write_png

    chart = [
        Bar(f"to {other}", rate and rate.rate, [rate.wilson, rate.bootstrap] if rate else [], f"{rate.answers if rate else 0} answers")
        for other, rate in found.rates.items()
    ]
    names = ["95% Wilson", "95% bootstrap over raters and photos"]
    write_png(bars(chart, f"how often {found.key.methods[0]} is preferred", "%", names), path, None)
