"""The page of settings is the one that the config models give."""

from __future__ import annotations

import settings_reference

from imagic_lora.core.config import RunConfig


def test_the_page_of_settings_is_up_to_date() -> None:
    """``make docs-settings`` would change nothing."""
    assert settings_reference.PAGE.read_text(encoding="utf-8") == settings_reference.page()


def test_every_setting_has_a_row_with_a_flag_and_a_help_text() -> None:
    """A setting without either could not be found or understood."""
    rows = [line for line in settings_reference.page().split("## Recipes")[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.replace("\\|", "").strip("|").split("|")] for row in rows]
    assert sorted(row[0].strip("`") for row in cells) == sorted(".".join(key) for key in settings_reference.flat(RunConfig().model_dump()))
    assert all(row[1].startswith("`--") and row[4] for row in cells)
