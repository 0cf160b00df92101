"""The demo command."""

from __future__ import annotations

from pathlib import Path

from ..console import err, plain, print_json, show_progress
from ..options import Json


def demo(*, out: Path = Path("outputs/demo"), as_json: Json = False) -> None:
    """Fit and edit one shipped picture on the embedded base, and show it beside the true edit.

    Parameters
    ----------
    out
        Folder for the sheet, the pictures and the adapter.
    """
    from ...bases.loading.progress import hide_progress_bars
    from ..demo import run_demo

    hide_progress_bars()
    page = run_demo(out, show_progress)
    if as_json:
        print_json({"sheet": str(page)})
    else:
        err.print(f"[green]Look at[/] {plain(page)}")
