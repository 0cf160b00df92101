"""Progress bars of the libraries that load a base."""

from __future__ import annotations


def hide_progress_bars() -> None:
    """No bars for reading files; downloads keep theirs."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
