"""The start of a process that works for a benchmark beside others. Light, so that nothing is imported before it has run."""

from __future__ import annotations

from ..core.environment import prepare_environment


def begin_worker(threads: int) -> None:
    """First call of a process that works beside others.

    Args:
        threads: of PyTorch.
    """
    prepare_environment()
    import torch

    torch.set_num_threads(threads)
