"""The tables of a benchmark, and one HTML page with all of its images."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..photos.page import page_template
from .cases import KINDS, case_at
from .critters import Bench, Result
from .summary import IDENTITY_LIMITS, SHARES
from .table import Table

TEMPLATES = Path(__file__).parent
PLOT = (640, 300)
"""Width and height of the plot of success over the identity limit, in pixels."""


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Returns the tables of a summary by their titles, for the terminal and for the page; without those that have no rows."""
    found = {
        "Success and its parts, %": _shares(summary),
        "Success by kind, %": _kinds(summary),
        "Success at other limits of the identity, %": _curves(summary),
        "Distance to the true edit": _distances(summary),
        "Cost of an image": _costs(summary),
        "imagic-lora compared with each row, case by case": _against(summary),
    }
    return {title: table for title, table in found.items() if table.rows}


def _shares(summary: Mapping[str, Any]) -> Table:
    rows = [[name, *(_share(row[measure]) for measure in SHARES)] for name, row in summary["methods"].items()]
    return Table(("method", *SHARES), rows)


def _costs(summary: Mapping[str, Any]) -> Table:
    forms = {"forward": ",.0f", "backward": ",.0f", "evaluations": ",.0f", "seconds": ".1f"}
    rows = []
    for name, row in summary["methods"].items():
        cost = row["cost"]
        cells = [format(cost[measure], form) for measure, form in forms.items()] if cost else ["-"] * len(forms)
        rows.append([name, *cells, f"{cost['adapter_bytes'] / 1e6:.2f}" if cost else "-"])
    return Table(("method", *forms, "MB kept"), rows)


def _distances(summary: Mapping[str, Any]) -> Table:
    forms = {"identity": ".2f", "background": ".1f", "psnr": ".1f", "ssim": ".3f", "clip": ".3f"}
    rows = [[name, *(_number(row[measure], form) for measure, form in forms.items())] for name, row in summary["methods"].items()]
    return Table(("method", "identity", "background", "PSNR dB", "SSIM", "CLIP"), rows)


def _kinds(summary: Mapping[str, Any]) -> Table:
    rows = [[name, *(_share(row["kinds"].get(kind, {}).get("success")) for kind in KINDS)] for name, row in summary["methods"].items()]
    return Table(("method", *KINDS), rows)


def _curves(summary: Mapping[str, Any]) -> Table:
    rows = [[name, *(f"{100 * point['mean']:.0f}" for point in row["curve"])] for name, row in summary["methods"].items()]
    return Table(("method", *(f"{limit:g}" for limit in IDENTITY_LIMITS)), rows)


def _against(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in summary["methods"].items():
        against = row.get("against")
        if against is None:
            continue
        multiples = [f"{against[measure]:.2f}" if against[measure] is not None else "-" for measure in ("evaluations", "seconds")]
        differences = [_share(against[measure], "+") for measure in ("success", "attributes")]
        decibels = _decibels(against["psnr"])
        rows.append([name, *differences, decibels, *multiples])
    return Table(("method", "success, ahead by", "attributes, ahead by", "dB, ahead by", "evals, times", "s, times"), rows)


def _share(mean: Mapping[str, float] | None, sign: str = "") -> str:
    """A mean and its interval in percent; ``sign`` is ``+`` for differences."""
    if mean is None:
        return "-"
    value, low, high = (format(100 * mean[name], f"{sign}.0f") for name in ("mean", "low", "high"))
    if low == high:
        return value
    return f"{value} [{low} to {high}]" if sign else f"{value} [{low}-{high}]"


def _decibels(mean: Mapping[str, float] | None) -> str:
    """A difference in dB and its interval."""
    return "-" if mean is None else f"{mean['mean']:+.1f} [{mean['low']:+.1f} to {mean['high']:+.1f}]"


def _number(mean: Mapping[str, float] | None, form: str) -> str:
    return format(mean["mean"], form) if mean else "-"


def write_page(bench: Bench, results: Sequence[Result], summary: Mapping[str, Any]) -> Path:
    """Writes ``index.html``: the tables, and a row of images for each case.

    All text is escaped. Images are embedded as data URLs, so that the page loads nothing and runs no script.

    Args:
        bench: the run.
        results: its results, in any order.
        summary: their summary, from :func:`~imagic_lora.bench.summary.summarise`.

    Returns:
        The path of the page.
    """
    rows = list(summary["methods"])
    page = page_template(TEMPLATES).render(
        summary=summary,
        tables=tables(summary),
        plot={"size": PLOT, "limits": [(_x(limit), f"{limit:g}") for limit in IDENTITY_LIMITS], "lines": _lines(summary)},
        columns=rows,
        cases=[_case_row(bench, index, results, rows) for index in range(bench.cases)],
    )
    path = bench.out / "index.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _x(limit: float) -> float:
    """Position of an identity limit in the plot, in pixels."""
    return round(PLOT[0] * (limit - IDENTITY_LIMITS[0]) / (IDENTITY_LIMITS[-1] - IDENTITY_LIMITS[0]), 1)


def _lines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The curve of every row of the plot: its name, its colour, and its points in pixels."""
    rows = summary["methods"]
    lines = []
    for k, (name, row) in enumerate(rows.items()):
        points = " ".join(f"{_x(point['limit'])},{PLOT[1] * (1 - point['mean']):.1f}" for point in row["curve"])
        lines.append({"name": name, "colour": f"hsl({360 * k // len(rows)} 75% {35 + 15 * (k % 2)}%)", "points": points})
    return lines


def _case_row(bench: Bench, index: int, results: Sequence[Result], rows: Sequence[str]) -> dict[str, Any]:
    """What the template shows of a case: its images, and a note on each."""
    case, folder = case_at(bench.seed, index), bench.folder(index)
    scores = {row: score for result in results if result.case == index for row, (score, _) in result.rows.items()}
    cells = []
    for row in rows:
        score = scores.get(row)
        if score is None:
            cells.append({"row": row, "state": "missed", "image": None, "note": "failed"})
            continue
        state = "success" if score.success else "aligned" if score.aligned else "missed"
        cells.append({"row": row, "state": state, "image": _data_url(folder / f"{row}.png"), "note": ", ".join(score.changed)})
    images = {name: _data_url(folder / f"{name}.png") for name in ("source", "truth")}
    return {"index": index, "kind": case.kind, "prompt": case.prompt, **images, "cells": cells}


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
