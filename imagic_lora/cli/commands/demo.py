"""The command ``demo``."""

from __future__ import annotations

from pathlib import Path

from ..console import err, plain, print_json, show_progress
from ..libraries import import_libraries
from ..options import Json


def demo(*, out: Path = Path("outputs/demo"), as_json: Json = False) -> None:
    """Fit and edit an example image on the embedded base.

    The demo needs no photo, no download and no GPU. It writes a sheet with the edits at several etas and the true edit.

    Parameters
    ----------
    out
        Folder for the sheet, the images and the adapter.
    """
    import_libraries()
    from ..demo import run_demo

    sheet = run_demo(out, show_progress)
    if as_json:
        print_json({"sheet": str(sheet)})
    else:
        err.print(f"[green]Wrote[/] {plain(sheet)}")
