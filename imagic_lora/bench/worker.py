"""The initialisation of a worker process of a benchmark.

The module imports no torch: :func:`begin_worker` sets environment variables before torch is imported.
"""

from __future__ import annotations

from ..core.environment import prepare_environment


def begin_worker(threads: int) -> None:
    """Initialises a worker process.

    Args:
        threads: number of PyTorch threads of the process.
    """
    prepare_environment()
    import torch

    torch.set_num_threads(threads)
