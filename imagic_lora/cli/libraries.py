"""Imports of torch, diffusers, transformers and peft for the commands that run models."""

from __future__ import annotations

from ..core.environment import quick_imports, wait_passively_on_busy_machine
from ..core.machine import find_card


def import_libraries(bitsandbytes: bool = False) -> None:
    """Imports what fit and edit need, as fast as possible, and hides the progress bars of loading.

    Args:
        bitsandbytes: whether the settings ask for it. On a CUDA device it is imported anyway, since ``auto`` uses it there.
    """
    wait_passively_on_busy_machine()
    with quick_imports(bitsandbytes or find_card() is not None):
        from peft.import_utils import is_bnb_4bit_available

        from ..bases.loading.progress import hide_progress_bars
        from ..training import configure, fit  # noqa: F401

        is_bnb_4bit_available()  # PEFT asks once and remembers the answer: otherwise it imports bitsandbytes with the first LoRA layer
        hide_progress_bars()
