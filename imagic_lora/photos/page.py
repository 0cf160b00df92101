"""HTML pages that show images: one head, with the colours of light and dark, for all of them."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

_SHARED = Path(__file__).parent / "data"


def page_template(folder: Path) -> Template:
    """Returns the template ``page.html`` of a folder, which extends ``base.html`` of this room. All text that it is given is escaped.

    ``base.html`` has the blocks ``meta``, ``title``, ``style`` and ``body``. A page loads nothing from elsewhere.

    Args:
        folder: folder of the template.
    """
    return Environment(loader=FileSystemLoader([folder, _SHARED]), autoescape=True).get_template("page.html")
