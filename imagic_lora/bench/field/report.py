"""The tables, and the files of a run: the summary, the scores of each picture, a sheet and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...adapters.durable import write_text
from ...adapters.writing import writable
from ...core.text import json_text
from ...photos.page import page_template
from ...photos.png import png
from ...photos.sheet import sheet
from ..evaluator.evaluator import Settings
from ..evaluator.measures import REGIONS, Measure
from ..table import Table
from .scoring import THUMBNAILS, Scored, rows_of

SUMMARY, SCORES, SHEET, PAGE = "summary.json", "scores.csv", "sheet.png", "index.html"
PUBLISHED = {
    "structure": "dist x10^3",
    "psnr_background": "PSNR",
    "lpips_squeeze_background": "LPIPS x10^3",
    "mse_background": "MSE x10^4",
    "ssim_background": "SSIM x100",
    "clip_l14": "CLIP-W x100",
    "clip_l14_edited": "CLIP-E x100",
}
"""Measures of the table of PIE-Bench, in its order, with its headings."""
_TITLES = {
    "whole": "Whole picture",
    "background": "Background: outside of the mask",
    "edited": "Edited region: inside of the mask",
}
_SHEET_CASES, _SHEET_ROWS = 24, 8
_NOTED = ("clip_l14", "clip_b32", "lpips_alex", "lpips_squeeze", "psnr")
"""Measures below a picture of the page: the first two that it has."""


def tables(summary: Mapping[str, Any], settings: Settings, across: int | None = None) -> dict[str, Table]:
    """Returns the tables of a summary by their titles, for the terminal and for the page; without those that have no values.

    Args:
        summary: from :func:`~imagic_lora.bench.field.summary.summarise`.
        settings: those of the evaluator.
        across: most methods side by side in a table; the others follow below. None for all.
    """
    named = {measure.name: measure for measure in settings.measures()}
    present = {name for row in summary["rows"].values() for name in row["measures"]}
    found: dict[str, Table] = {}
    if summary["benchmark"] == "PIE-Bench" and (published := [named[name] for name in PUBLISHED if name in present]):
        found["The columns of PIE-Bench's table"] = _published(summary, published)
    rows = list(summary["rows"])
    groups = [rows[start : start + (across or len(rows))] for start in range(0, len(rows), across or len(rows))]
    for region in REGIONS:
        measured = [measure for measure in named.values() if measure.region == region and measure.name in present]
        for number, group in enumerate(groups if measured else (), 1):
            title = _TITLES[region] + (f" ({number} of {len(groups)})" if len(groups) > 1 else "")
            found[title] = _measured(summary, measured, group)
    found |= _by_class(summary, named)
    costs = [(name, row["cost"]) for name, row in summary["rows"].items() if row["cost"]]
    if costs:
        cells = [[name, *(f"{cost[key]:,.0f}" for key in ("forward", "backward")), f"{cost['seconds']:.1f}"] for name, cost in costs]
        found["Cost of a picture"] = Table(("method", "forward", "backward", "seconds"), cells)
    return found


def _published(summary: Mapping[str, Any], columns: Sequence[Measure]) -> Table:
    """The means as the paper lists them: a row a method."""
    cells = []
    for name, row in summary["rows"].items():
        cells.append([name, *(_scaled(row["measures"].get(measure.name), measure) for measure in columns)])
    return Table(("method", *(PUBLISHED[measure.name] for measure in columns)), cells)


def _measured(summary: Mapping[str, Any], measured: Sequence[Measure], rows: Sequence[str]) -> Table:
    """The measures with their intervals: a column a method."""
    entries = [summary["rows"][row] for row in rows]
    cells = [["pictures", *(str(row["pictures"] - row["failed"]) for row in entries)], ["failed", *(str(row["failed"]) for row in entries)]]
    for measure in measured:
        cells.append([_heading(measure), *(_cell(row["measures"].get(measure.name), measure) for row in entries)])
    return Table(("", *rows), cells)


def _by_class(summary: Mapping[str, Any], named: Mapping[str, Measure]) -> dict[str, Table]:
    """Means of the first measure of the published table, or of PSNR, by class."""
    shown = next((named[name] for name in ("structure", *_NOTED) if name in named), None)
    classes = list(dict.fromkeys(group for row in summary["rows"].values() for group in row["groups"]))
    if shown is None or not classes:
        return {}
    rows = []
    for name, row in summary["rows"].items():
        rows.append([name, *(_scaled(row["groups"].get(group, {}).get(shown.name), shown) for group in classes)])
    return {f"{_heading(shown)} by class": Table(("method", *classes), rows)}


def _heading(measure: Measure) -> str:
    return f"{measure.title} {'(+)' if measure.better == 'higher' else '(-)'}"


def _scaled(mean: Mapping[str, float] | None, measure: Measure) -> str:
    return f"{mean['mean'] * measure.scale:.{measure.decimals}f}" if mean else "-"


def _cell(mean: Mapping[str, float] | None, measure: Measure) -> str:
    if mean is None:
        return "-"
    value, low, high = (f"{mean[name] * measure.scale:.{measure.decimals}f}" for name in ("mean", "low", "high"))
    return f"{value} [{low} to {high}]"


def write_files(out: Path, summary: Mapping[str, Any], settings: Settings, scored: Sequence[Scored]) -> Path:
    """Writes all files of a run; returns the path of the page.

    Args:
        out: the folder, which holds the thumbnails.
        summary: the summary.
        settings: those of the evaluator.
        scored: what came of each picture, in the order of the table.

    Raises:
        ImagicError: the folder cannot be written to.
    """
    write_text(out / SUMMARY, json_text(summary))
    write_text(out / SCORES, _csv(settings, scored))
    drawn = _sheet(out, summary, scored)
    if drawn is not None:
        with writable(out):
            (out / SHEET).write_bytes(png(drawn, {name: summary[name] for name in ("benchmark", "version")}))
    write_text(out / PAGE, _page(out, summary, settings, scored))
    return out / PAGE


def _csv(settings: Settings, scored: Sequence[Scored]) -> str:
    """The scores, one line a picture."""
    names, file = [measure.name for measure in settings.measures()], io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["case", "class", "row", "photo", "edited", "prompt", *names, "error"])
    for one in scored:
        case = one.picture.case
        about = [case.name, case.group or "", one.picture.row, case.photo, one.picture.path or "", case.prompt]
        writer.writerow([*about, *(repr(one.values[name]) if name in one.values else "" for name in names), last_line(one.error)])
    return file.getvalue().encode("utf-8", "backslashreplace").decode()


def last_line(error: str | None) -> str:
    """Returns the last line of an error: what happened, without the traceback."""
    return error.strip().splitlines()[-1] if error and error.strip() else ""


def _sheet(out: Path, summary: Mapping[str, Any], scored: Sequence[Scored]) -> Image.Image | None:
    """The contact sheet: the photos and the edits of some cases, spread over all; None if nothing was scored."""
    rows = list(summary["rows"])[:_SHEET_ROWS]
    cases = [case for case in _cases(scored) if any(one.error is None for one in case.values())]
    step = max(1, -(-len(cases) // _SHEET_CASES))
    lines = []
    for case in cases[::step]:
        first = next(one for one in case.values() if one.error is None)
        cells = [(first.picture.case.prompt, _opened(out, first.photo))]
        cells += [(row, _opened(out, case[row].thumbnail) if row in case and case[row].error is None else _blank()) for row in rows]
        lines.append(cells)
    return sheet(lines, f"{summary['benchmark']}: the photo and its edits") if lines else None


def _cases(scored: Sequence[Scored]) -> list[dict[str, Scored]]:
    """The pictures of each case by row."""
    found: dict[int, dict[str, Scored]] = {}
    for one in scored:
        found.setdefault(one.picture.case.index, {})[one.picture.row] = one
    return [found[index] for index in sorted(found)]


def _opened(out: Path, name: str) -> Image.Image:
    with Image.open(out / THUMBNAILS / f"{name}.jpg") as image:
        return image.convert("RGB")


def _blank() -> Image.Image:
    return Image.new("RGB", (8, 8), "#ddd")


def _page(out: Path, summary: Mapping[str, Any], settings: Settings, scored: Sequence[Scored]) -> str:
    """The HTML page. All text is escaped; it runs no script, and loads its thumbnails when they come into view."""
    rows = rows_of([one.picture for one in scored])
    return page_template(Path(__file__).parent).render(
        summary=summary,
        tables=tables(summary, settings),
        columns=rows,
        cases=list(_shown(out, scored, rows, {measure.name: measure for measure in settings.measures()})),
        errors=[error | {"error": last_line(error["error"])} for error in summary["errors"]],
    )


def _shown(out: Path, scored: Sequence[Scored], rows: Sequence[str], named: Mapping[str, Measure]) -> Iterator[dict[str, Any]]:
    """What the page shows of each case."""
    for by_row in _cases(scored):
        case = next(iter(by_row.values())).picture.case
        photo = next((one.photo for one in by_row.values() if one.photo), "")
        cells = []
        for row in rows:
            one = by_row.get(row)
            noted = [named[name] for name in _NOTED if one and name in one.values][:2]
            notes = [f"{measure.title} {one.values[measure.name] * measure.scale:.1f}" for measure in noted] if one else []
            cells.append(
                {
                    "row": row,
                    "image": _url(out, one.thumbnail if one else ""),
                    "note": ", ".join(notes),
                    "error": last_line(one.error) if one else "-",
                }
            )
        yield {"case": case, "photo": _url(out, photo), "cells": cells}


def _url(out: Path, name: str) -> str | None:
    return f"{THUMBNAILS}/{name}.jpg" if name and (out / THUMBNAILS / f"{name}.jpg").is_file() else None
