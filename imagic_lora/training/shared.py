"""Stages of several fits in step: one call of the denoiser serves the batches of all, each with its own conditioning and LoRA layers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from typing import TypeVar

import torch

from ..core.conditioning import concatenate
from ..core.errors import Stopped
from .objective import denoising_loss
from .stage import Batch, Progress, StepReport

Key = TypeVar("Key", bound=Hashable)


def run_together(batches: Sequence[Batch]) -> None:
    """Runs batches of one base and one size in one call of the denoiser, and sets the losses of each.

    The backward pass is that of the sum of what each fit by itself minimises. No sample depends on another one, so the gradients of each
    fit are its own up to rounding, and stay finite where another fit's are not.

    Args:
        batches: all of training steps, or all of evaluations.
    """
    trains = batches[0].scale is not None
    with torch.set_grad_enabled(trains):
        conditioning = concatenate([batch.conditioning.expand(len(batch.noise)) for batch in batches])
        latents = torch.cat([batch.latents.expand_as(batch.noise) for batch in batches])
        noise, times = torch.cat([batch.noise for batch in batches]), torch.cat([batch.times for batch in batches])
        losses = denoising_loss(batches[0].base, latents, conditioning, noise, times).split(len(batches[0].noise))
        if trains:
            torch.stack([own.mean() * (batch.scale or 1.0) for own, batch in zip(losses, batches, strict=True)]).sum().backward()
    for own, batch in zip(losses, batches, strict=True):
        batch.losses = own.detach()


def in_step(
    running: Mapping[Key, Generator[Progress, None, None]], using: Callable[[Sequence[Key]], AbstractContextManager[None]]
) -> Generator[tuple[Key, StepReport | Exception], None, None]:
    """Runs the same stage of several fits; each generator waits at its batches until all others wait, too.

    A fit that raises an exception ends, and the others go on. Closing the generator closes those of all fits.

    Args:
        running: the running stage of each fit, which yields its batches.
        using: a context in which the parts of a batch belong to these fits, and a batch of any size to a single one.

    Yields:
        The reports of each fit, or the exception that ended it.

    Raises:
        Stopped: of the first fit that was stopped, once all have stopped or ended.
        Exception: what a shared call of the denoiser raises; the fits are closed.
    """
    left, waiting, stopped = dict(running), dict[Key, Batch](), list[Stopped]()
    with ExitStack() as stack:
        for steps in left.values():
            stack.callback(steps.close)
        while left:
            for key in [key for key in left if key not in waiting]:
                try:
                    with using([key]):
                        item = next(left[key])
                except StopIteration:
                    del left[key]
                except Stopped as error:
                    del left[key]
                    stopped.append(error)
                except Exception as error:  # of this photo: the others go on
                    del left[key]
                    yield key, error
                else:
                    if isinstance(item, Batch):
                        waiting[key] = item
                    else:
                        yield key, item
            if waiting and len(waiting) == len(left):
                for keys in _ready(waiting):
                    with using(keys):
                        run_together([waiting.pop(key) for key in keys])
    if stopped:
        raise stopped[0]


def _ready(waiting: Mapping[Key, Batch]) -> Iterable[list[Key]]:
    """The batches that run next, by size: evaluations first, and training steps once no fit has one left, so that they are shared."""
    evaluations = [key for key, batch in waiting.items() if batch.scale is None]
    by_size = sorted(evaluations or waiting, key=lambda key: len(waiting[key].noise))
    return [list(keys) for _, keys in groupby(by_size, key=lambda key: len(waiting[key].noise))]
