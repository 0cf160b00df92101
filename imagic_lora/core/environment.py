"""Environment of a process that runs models: log levels of the libraries, waiting threads, imports. This module does not import torch."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version

import psutil

_SAMPLE_SECONDS = 0.1
_BUSY_PERCENT = 50  # of one core, over all cores of this process
_IMPORTERS = ("diffusers", "peft", "transformers")


LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")


@cache
def library_versions() -> dict[str, str]:
    """The versions of the libraries that run the models, by name."""
    return {library: version(library) for library in LIBRARIES}


def prepare_environment() -> None:
    """Makes transformers, diffusers, bitsandbytes and torch.distributed log errors only.

    Must run before these libraries are imported. Environment variables that the user has set are kept.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def wait_passively_on_busy_machine() -> None:
    """Sets ``OMP_WAIT_POLICY=PASSIVE`` if other processes use the CPU cores; must run before torch is imported.

    PyTorch uses a thread for each core. A thread that is done spins until the others are, and takes time from the one that another process
    has delayed: training is several times slower. Passive threads sleep instead, which costs half of the speed on an idle machine. The
    number of threads stays, and with it every bit of the results. What the user has set is kept.
    """
    if any(name in os.environ for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        return
    busy = psutil.cpu_percent(interval=_SAMPLE_SECONDS, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    if sum(busy[core] for core in ours if core < len(busy)) > _BUSY_PERCENT:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


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
