"""The result of a sweep: its scores as a plot, and its images as a table. A point and a cell open their image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import events, ui

from ...core.text import exact
from ..running import OUTPUT
from .picture import thumbnail


def show_sweep(result: dict[str, Any], job_url: str, opened: Callable[[str], Any]) -> None:
    """Shows the result of a sweep.

    Args:
        result: what the command ``sweep`` returns.
        job_url: the address of the files of the job.
        opened: called with the path of an image in the folder of the job, when its point or its cell is pressed.
    """
    rows = [row for row in result["scores"] if row.get("tuned", True)]
    files = {(row["eta"], row["seed"]): f"{OUTPUT}/{row['file']}" for row in rows if row.get("file")}  # older jobs have none
    ui.label(f"Suggested eta: {result['suggested']:g}").classes("live")
    _plot(rows, result["suggested"], lambda eta, seed: opened(files[eta, seed]) if (eta, seed) in files else None)
    with ui.row().classes("strip"):
        for name in ("sheet", "plot"):
            thumbnail(f"{job_url}/{OUTPUT}/{name}.png", name, partial(opened, f"{OUTPUT}/{name}.png"))
    if files:
        _table(files, result["suggested"], job_url, opened)


def _plot(rows: list[dict[str, Any]], suggested: float, pressed: Callable[[float, int], Any]) -> None:
    """Draws the scores over eta; hovering gives the values."""
    names = [name for name in rows[0] if name not in ("eta", "seed", "tuned", "file", "ssim", "ssim_photo")]
    series: list[dict[str, Any]] = [
        {"name": name, "type": "scatter", "data": [[row["eta"], row[name], f"seed {row['seed']}"] for row in rows]} for name in names
    ]
    series[0]["markLine"] = {"symbol": "none", "data": [{"xAxis": suggested, "name": "suggested"}]}
    axes = {"xAxis": {"type": "value", "name": "eta"}, "yAxis": {"type": "value", "scale": True}}
    options = {**axes, "tooltip": {"trigger": "item"}, "legend": {"top": 0}, "series": series, "animation": False}

    def point(event: events.EChartPointClickEventArguments) -> None:
        row = rows[event.data_index]
        pressed(row["eta"], row["seed"])

    ui.echart(options, on_point_click=point).classes("chart").props('role="img" aria-label="Scores over eta"')


def _table(files: dict[tuple[float, int], str], suggested: float, job_url: str, opened: Callable[[str], Any]) -> None:
    """Shows the images: a row for each seed, a column for each eta."""
    etas, seeds = sorted({eta for eta, _ in files}), sorted({seed for _, seed in files})
    with ui.element("div").classes("cells"), ui.element("table"):
        with ui.element("tr"):
            _heading("seed", "col")
            for eta in etas:
                _heading(f"eta {exact(eta)}" + (" (suggested)" if eta == suggested else ""), "col")
        for seed in seeds:
            with ui.element("tr"):
                _heading(str(seed), "row")
                for file in (files[eta, seed] for eta in etas):
                    with ui.element("td"):
                        thumbnail(f"{job_url}/{file}", file.rpartition("/")[2].removesuffix(".png"), partial(opened, file))


def _heading(text: str, scope: str) -> None:
    with ui.element("th").props(f'scope="{scope}"'):
        ui.label(text)
