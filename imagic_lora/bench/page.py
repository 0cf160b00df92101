"""The table of a benchmark in words, and one HTML page with every picture in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .cases import KINDS, case_at
from .critters import Bench, Result
from .summary import SHARES

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """Cells as text, a list for each row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """What the terminal and the page show, by title."""
    return {
        "Success and its parts, %": _shares(summary),
        "Success by kind, %": _kinds(summary),
        "Distance to the true edit": _distances(summary),
        "What a picture costs": _costs(summary),
        "imagic-lora against each, case by case": _against(summary),
    }


def _shares(summary: Mapping[str, Any]) -> Table:
    rows = [[name, *(_share(row[measure]) for measure in SHARES)] for name, row in summary["methods"].items()]
    return Table(("method", *SHARES), rows)


def _costs(summary: Mapping[str, Any]) -> Table:
    forms = {"forward": ",.0f", "backward": ",.0f", "evaluations": ",.0f", "seconds": ".1f"}
    rows = []
    for name, row in summary["methods"].items():
        cost = row["cost"]
        plain = [format(cost[measure], form) for measure, form in forms.items()] if cost else ["-"] * len(forms)
        rows.append([name, *plain, f"{cost['adapter_bytes'] / 1e6:.2f}" if cost else "-"])
    return Table(("method", *forms, "MB kept"), rows)


def _distances(summary: Mapping[str, Any]) -> Table:
    forms = {"identity": ".2f", "background": ".1f", "psnr": ".1f", "ssim": ".3f", "clip": ".3f"}
    rows = [[name, *(_plain(row[measure], form) for measure, form in forms.items())] for name, row in summary["methods"].items()]
    return Table(("method", "identity", "background", "PSNR dB", "SSIM", "CLIP"), rows)


def _kinds(summary: Mapping[str, Any]) -> Table:
    rows = [[name, *(_share(row["kinds"].get(kind, {}).get("success")) for kind in KINDS)] for name, row in summary["methods"].items()]
    return Table(("method", *KINDS), rows)


def _against(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in summary["methods"].items():
        against = row.get("against")
        if against is None:
            continue
        times = [f"{against[measure]:.2f}" if against[measure] is not None else "-" for measure in ("evaluations", "seconds")]
        ahead = [_share(against[measure], "+") for measure in ("success", "attributes")]
        rows.append([name, *ahead, *times])
    return Table(("method", "success, ahead by", "attributes, ahead by", "evals, times", "s, times"), rows)


def _share(mean: Mapping[str, float] | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    middle, low, high = (format(100 * mean[name], f"{sign}.0f") for name in ("mean", "low", "high"))
    if low == high:
        return middle
    return f"{middle} [{low} to {high}]" if sign else f"{middle} [{low}-{high}]"


def _plain(mean: Mapping[str, float] | None, form: str) -> str:
    return format(mean["mean"], form) if mean else "-"


def write_page(bench: Bench, results: Sequence[Result], summary: Mapping[str, Any]) -> Path:
    """Writes ``index.html``: the tables, and a line of pictures for each case; all text is escaped, nothing is loaded or run."""
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    rows = list(summary["methods"])
    page = templates.get_template("page.html").render(
        summary=summary,
        tables=tables(summary),
        columns=rows,
        cases=[_line(bench, index, results, rows) for index in range(bench.cases)],
    )
    path = bench.out / "index.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _line(bench: Bench, index: int, results: Sequence[Result], rows: Sequence[str]) -> dict[str, Any]:
    case, folder = case_at(bench.seed, index), bench.folder(index)
    scores = {row: score for one in results if one.case == index for row, (score, _) in one.rows.items()}
    cells = []
    for row in rows:
        score = scores.get(row)
        if score is None:
            cells.append({"row": row, "state": "missed", "image": None, "note": "failed"})
            continue
        state = "success" if score.success else "aligned" if score.aligned else "missed"
        cells.append({"row": row, "state": state, "image": _data(folder / f"{row}.png"), "note": ", ".join(score.changed)})
    shown = {name: _data(folder / f"{name}.png") for name in ("source", "truth")}
    return {"index": index, "kind": case.kind, "text": case.text, **shown, "cells": cells}


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
