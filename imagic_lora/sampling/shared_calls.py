"""Images of several photos at once: code that samples one photo runs for each, and the calls of the denoiser are shared."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Semaphore, Thread, get_ident
from typing import Any, Generic, TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from ..bases.base import Base

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Abandoned(BaseException):
    """Ends the thread of a job whose caller has gone."""


@dataclass(eq=False)
class _Job(Generic[Value]):
    """Code that samples the images of one photo, in a thread of its own; it waits where it calls the denoiser."""

    work: Callable[[], Value]
    turn: Semaphore = field(default_factory=lambda: Semaphore(0))
    call: dict[str, Any] | None = None
    answer: Tensor | Exception | None = None
    result: Value | BaseException | None = None
    done: bool = False


def sampled_together(
    base: Base, jobs: Mapping[Key, Callable[[], Value]], using: Callable[[Sequence[Key]], AbstractContextManager[None]], most: int
) -> dict[Key, Value | BaseException]:
    """Runs jobs that call the denoiser without gradients; calls of one batch size that wait at the same time become one.

    One job runs at a time, each until its next call of the denoiser, so that jobs may share everything else. On a transformer the jobs run
    one after the other.

    Args:
        base: the base; its U-Net is bit-equal to before afterwards.
        jobs: by key; each samples as if it was alone.
        using: a context in which the parts of a batch belong to these jobs.
        most: largest number of samples in a shared call.

    Returns:
        What each job returns or raises.
    """
    if len(jobs) < 2 or base.component != "unet":
        found: dict[Key, Value | BaseException] = {}
        for key, work in jobs.items():
            with using([key]):
                found[key] = _outcome(work)
        return found
    running, ready = {key: _Job(work) for key, work in jobs.items()}, Semaphore(0)
    threads = {key: Thread(target=_run, args=(job, ready), daemon=True) for key, job in running.items()}
    with _intercepted(base, running, threads, ready) as forward:
        try:
            for key in running:
                threads[key].start()
                with using([key]):
                    ready.acquire()
            while waiting := {key: job for key, job in running.items() if not job.done}:
                for keys in _shares(waiting, most):
                    with using(keys):
                        _answer(forward, [running[key] for key in keys])
                for job in waiting.values():
                    job.turn.release()
                    ready.acquire()
        finally:
            for key, job in running.items():
                if not job.done and threads[key].is_alive():  # an exception in this thread, such as KeyboardInterrupt
                    job.answer = None
                    job.turn.release()
                    threads[key].join()
    return {key: job.result for key, job in running.items()}  # pyright: ignore[reportReturnType]  # every job is done


def _outcome(work: Callable[[], Value]) -> Value | BaseException:
    try:
        return work()
    except Exception as error:  # given to whoever waits for it
        return error


def _run(job: _Job[Any], ready: Semaphore) -> None:
    """The thread of a job."""
    try:
        job.result = job.work()
    except BaseException as error:  # given to whoever waits for it, in its own thread
        job.result = error
    finally:
        job.done = True
        ready.release()


@contextmanager
def _intercepted(
    base: Base, running: Mapping[Key, _Job[Any]], threads: Mapping[Key, Thread], ready: Semaphore
) -> Iterator[Callable[..., Any]]:
    """Makes a call of the U-Net in the thread of a job wait for its answer. Yields the function that really calls it."""
    denoiser: Any = base.denoiser
    forward, signature = denoiser.forward, inspect.signature(denoiser.forward)

    def wait(*args: Any, **kwargs: Any) -> Any:
        job = next((running[key] for key, thread in threads.items() if thread.ident == get_ident()), None)
        if job is None:
            return forward(*args, **kwargs)
        job.call, job.answer = signature.bind(*args, **kwargs).arguments, None
        returns_object = job.call.pop("return_dict", True)
        ready.release()
        job.turn.acquire()
        if job.answer is None:
            raise _Abandoned
        if isinstance(job.answer, Exception):
            raise job.answer
        return UNet2DConditionOutput(sample=job.answer) if returns_object else (job.answer,)

    denoiser.forward = wait
    try:
        yield forward
    finally:
        del denoiser.forward  # that of its class


def _shares(waiting: Mapping[Key, _Job[Any]], most: int) -> Iterator[list[Key]]:
    """Sorts the waiting calls into those that become one: of one size, and with the same arguments."""
    alike: dict[Any, list[Key]] = defaultdict(list)
    for key, job in waiting.items():
        assert job.call is not None
        alike[len(job.call["sample"]), _layout(job.call)].append(key)
    for (size, _), keys in alike.items():
        count = max(1, most // size)
        yield from (keys[start : start + count] for start in range(0, len(keys), count))


def _layout(value: Any) -> Any:
    """What two arguments have in common that can be joined: names, kinds, and the values of those that are no tensors."""
    if isinstance(value, Mapping):
        return tuple((name, _layout(value[name])) for name in sorted(value))
    return "tensor" if isinstance(value, Tensor) else repr(value)


def _answer(forward: Callable[..., Any], jobs: Sequence[_Job[Any]]) -> None:
    """Calls the U-Net once for several jobs."""
    calls = [job.call for job in jobs]
    sizes = [len(call["sample"]) for call in calls if call]
    try:
        with torch.no_grad():
            output = forward(**_joined(calls, sizes), return_dict=False)[0]
    except Exception as error:  # out of memory: each job says so
        for job in jobs:
            job.answer = error
    else:
        for job, part in zip(jobs, output.split(sizes), strict=True):
            job.answer = part


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Joins an argument of several calls; a number that holds for all samples of a call, such as the timestep, is repeated."""
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], sizes) for name in first}
    if not isinstance(first, Tensor):
        return first
    return torch.cat([value.expand(size) if value.ndim == 0 else value for value, size in zip(values, sizes, strict=True)])
