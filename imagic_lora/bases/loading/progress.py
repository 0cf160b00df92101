"""Progress bars of the libraries that load a base."""

from __future__ import annotations


def hide_progress_bars() -> None:
    """Hides the progress bars of diffusers and transformers for reading files. Download progress bars stay visible."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
