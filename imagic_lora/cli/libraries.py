"""Imports of torch, diffusers, transformers and peft for the commands that run models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..core.device_config import MemoryConfig
from ..core.environment import quick_imports, wait_passively_on_busy_machine
from ..core.errors import ImagicError
from ..core.machine import find_card

_PREFIXES = ("HF_", "TORCH", "TRANSFORMERS_", "DIFFUSERS_", "PYTORCH_")  # of the environment variables that the libraries read


def import_libraries(bitsandbytes: bool = False) -> None:
    """Imports what fit and edit need, as fast as possible, and hides the progress bars of loading.

    Args:
        bitsandbytes: whether the settings ask for it. On a CUDA device it is imported anyway, since ``auto`` uses it there.

    Raises:
        ImagicError: a library does not accept an environment variable; the current folder is deleted; no temporary file can be written.
    """
    _check_folders()
    wait_passively_on_busy_machine()
    with quick_imports(bitsandbytes or find_card() is not None):
        try:
            from peft.import_utils import is_bnb_4bit_available

            from ..bases.loading.progress import hide_progress_bars
            from ..training import configure, fit  # noqa: F401
        except ValueError as error:  # what a library raises for HF_HUB_DOWNLOAD_TIMEOUT=abc or TORCH_LOGS=abc
            names = ", ".join(name for name in sorted(os.environ) if name.startswith(_PREFIXES))  # no values: one may be a token
            got = f"a library cannot be imported ({next(iter(str(error).strip().splitlines()), '')})"
            raise ImagicError(got, "environment variables that it accepts", f"correct or unset the wrong one of {names}") from error

        is_bnb_4bit_available()  # PEFT asks once and remembers the answer: otherwise it imports bitsandbytes with the first LoRA layer
        hide_progress_bars()


def quantized(memory: MemoryConfig) -> bool:
    """Whether memory levers quantize anything, so that bitsandbytes is needed."""
    return "nf4" in (memory.quantize, memory.quantize_text)


def _check_folders() -> None:
    """Raises ImagicError for folders that the libraries need when they are imported, where they would raise FileNotFoundError."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ImagicError("the current folder has been deleted", "a current folder that exists", "change to another folder") from error
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        got = f"no folder for temporary files can be written to ({error.strerror})"
        raise ImagicError(got, "a writable folder", "set TMPDIR to one") from error
