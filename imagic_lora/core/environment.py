"""Environment of a process that runs models: quiet libraries. To be set before they are imported. No torch here."""

from __future__ import annotations

import logging
import os


def prepare_environment() -> None:
    """Lets the libraries below us print errors only; what the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
