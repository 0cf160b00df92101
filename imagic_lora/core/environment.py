"""Environment of a process that runs models: log levels of the libraries, and how they are imported. This module does not import torch."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_IMPORTERS = ("diffusers", "peft", "transformers")


def prepare_environment() -> None:
    """Makes transformers, diffusers, bitsandbytes and torch.distributed log errors only.

    Must run before these libraries are imported. Environment variables that the user has set are kept.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quick_imports(bitsandbytes: bool) -> Iterator[None]:
    """Speeds up the imports inside of it: for commands, whose process belongs to us.

    The libraries create a million objects that stay, and collecting garbage meanwhile takes a fifth of the time: it is off here, and what
    was imported is exempt from it afterwards. diffusers and peft import bitsandbytes wherever it is installed, which takes another fifth.

    Args:
        bitsandbytes: False hides it from libraries that are imported here, for the rest of the process. Our own imports of it still work.
    """
    hidden = not bitsandbytes and not any(name in sys.modules for name in ("bitsandbytes", *_IMPORTERS))
    enabled = gc.isenabled()
    gc.disable()
    if hidden:
        sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]  # makes its import raise ImportError
    try:
        yield
    finally:
        if hidden:
            del sys.modules["bitsandbytes"]
        if enabled:
            gc.freeze()
            gc.enable()
