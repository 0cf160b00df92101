"""Measures the stages of one run: a few real steps each, with their peak memory and their time."""

from __future__ import annotations

import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.modes import MODES
from ...bases.loading.configs import architecture
from ...core.conditioning import Conditioning
from ...core.config import RunConfig
from ...core.runtime import Processes, peak_memory, resolve_runtime
from ...critters import render, scene_at
from ...memory.tracker import Tracker
from ...photos.png import write_png
from ...photos.reading import read_photo
from ...sampling.generate import generate
from ...sampling.mixing import mixtures
from ...sampling.pipelines import negative
from ...training.embed import embed_stage, optimised
from ...training.encode import encode_photo, encode_run
from ...training.fit import open_base
from ...training.monitoring.convergence import Convergence
from ...training.monitoring.previews import Previews
from ...training.rehearsing.random_base import random_base, random_conditioning
from ...training.run import Run
from ...training.stage import Stage
from ...training.tune import tune_stage

PROMPT = "a dog jumping"
_WARM = 2  # steps before the time is taken; the first one creates the states of the optimizer
_MOST = 10  # timed steps of a stage
_SHORT = 4  # sampling steps of the first images
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What a stage took.

    Args:
        stage: its name.
        allocated: peak of all tensors in bytes: counted by PyTorch's allocator on CUDA, and by :class:`Tracker` on the CPU.
        reserved: peak of PyTorch's allocator in bytes, unused parts included; None on the CPU, which has no such allocator.
        process: peak of the process in bytes: on the card, or its resident memory on the CPU.
        seconds: of a training step (the median) or of an image; None for stage encode.
        count: number of timed steps or images.
        estimated: whether the time of an image is that of fewer sampling steps, in proportion.
    """

    stage: str
    allocated: int
    reserved: int | None
    process: int
    seconds: float | None = None
    count: int = 0
    estimated: bool = False


class Meter:
    """Peak memory of a stage on a device.

    Args:
        device: the device.
        free: free bytes of the card before this process used it.
    """

    def __init__(self, device: torch.device, free: int) -> None:
        self.device, self.free = device, free
        self._tracker: Tracker | None = None

    @contextmanager
    def stage(self) -> Iterator[None]:
        """A stage: the peaks of :meth:`measured` are those since its start."""
        gc.collect()
        self._tracker = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # resets the peak of the resident memory (Linux)
        yield

    @contextmanager
    def counting(self) -> Iterator[None]:
        """On the CPU, counts the tensors of the block and those that exist. This takes time, so no time is taken inside."""
        if self.device.type == "cuda":
            yield
            return
        with Tracker() as tracker:
            tracker.adopt(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
            self._tracker = tracker
            yield

    def measured(self, name: str, seconds: float | None = None, count: int = 0, estimated: bool = False) -> Measured:
        """Returns the figures of the current stage."""
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            used = self.free - torch.cuda.mem_get_info(self.device)[0]  # of other programs too, if they took more in the meantime
            process = used + reserved - torch.cuda.memory_reserved(self.device)
            return Measured(name, allocated, reserved, process, seconds, count, estimated)
        assert self._tracker is not None, "a stage counts its tensors"
        return Measured(name, self._tracker.peak, None, _resident_peak(self.device), seconds, count, estimated)

    def timed(self, work: Callable[[], object]) -> float:
        """Runs work to its end on the device, and returns its seconds."""
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _resident_peak(device: torch.device) -> int:
    """Peak of the resident memory since it was reset; where it cannot be, since the start of the process."""
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024
    return peak_memory(device)


def measure(run: RunConfig, random_weights: bool, seconds: float, free: int) -> Iterator[Measured]:
    """Measures the stages of a run, one after the other.

    Args:
        run: the settings of the run.
        random_weights: whether the base has random weights instead of its own: neither time nor memory depends on their values.
        seconds: after which a stage is not measured further; every stage takes its first steps all the same.
        free: free bytes of the card before this process used it.

    Raises:
        ImagicError: the base cannot be loaded, or memory runs out.
    """
    meter = Meter(resolve_runtime(run.memory).device, free)
    base: Any = random_base(architecture(run.base), run, resolve_runtime(run.memory)) if random_weights else open_base(run)
    run = run.model_copy(update={"memory": base.runtime.memory})
    with meter.stage():
        with meter.counting():
            inputs = _inputs(run, base, random_weights)
        yield meter.measured("encode")
    prompt = "" if random_weights else PROMPT
    if not inputs.target.vectors:
        base.offload_encoders()
    with meter.stage():
        stage = embed_stage(base, inputs.latents, inputs.target, run.embed, run.seed, Processes(), prompt)
        yield meter.measured("embed", *_steps(stage, meter, seconds))
    e_opt = optimised(stage, inputs.target if run.embed.stores_difference else None)
    del stage
    base.offload_encoders()
    with MODES[run.tune.mode].trainables(base, run.tune, run.seed, False) as trainables:
        with meter.stage():
            stage = tune_stage(base, inputs.latents, e_opt, trainables, run.tune, run.seed, Processes())
            yield meter.measured("tune", *_steps(stage, meter, seconds))
        del stage
        with meter.stage():
            yield meter.measured("generate", *_images(inputs, e_opt, meter, seconds))


def _inputs(run: RunConfig, base: Any, random_weights: bool) -> Run:
    """Photo and prompt, encoded as by a fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.png"
        write_png(render(scene_at("demo", 0)), path, None)
        photo = read_photo(path)
    canvas, latents = encode_photo(run, base, photo, None)
    if not random_weights:
        return encode_run(run, base, photo, PROMPT, Processes(), None, False, (canvas, latents))
    base.load_encoders()  # their weights are in memory as if the prompt had been encoded
    height, width = canvas.pixels.shape[2:]
    target = random_conditioning(base, height, width)
    null = random_conditioning(base, height, width) if base.architecture.guidance == "cfg" else None
    inputs = canvas, latents, target, null, negative(base, run.edit, null)
    return Run(run, base, photo, None, False, "", Processes(), *inputs, Convergence(run), Previews(run))


def _steps(stage: Stage, meter: Meter, seconds: float) -> tuple[float, int]:
    """The median time of a step and the number of timed steps."""
    with meter.counting():
        meter.timed(lambda: [stage.step(k) for k in range(_WARM)])
    taken: list[float] = []
    while not taken or (len(taken) < _MOST and sum(taken) < seconds):
        taken.append(meter.timed(lambda: stage.step(_WARM + len(taken))))
    stage.check()
    return statistics.median(taken), len(taken)


def _images(inputs: Run, e_opt: Conditioning, meter: Meter, seconds: float) -> tuple[float, int, bool]:
    """The time of an image, the number of images, and whether the time is estimated from fewer sampling steps."""
    base, config = inputs.base, inputs.config
    count = config.edit.batch_size
    short = min(_SHORT, config.edit.steps)

    def sampled(steps: int) -> None:
        settings = config.edit.model_copy(update={"steps": steps})
        conditionings, sources = mixtures(base, inputs.prompt, inputs.target, e_opt, [config.eta] * count, settings)
        base.offload_encoders()
        with torch.no_grad():
            list(generate(base, conditionings, range(count), settings, inputs.canvas, inputs.negative, sources))

    with meter.counting():
        sampled(short)
    taken = meter.timed(lambda: sampled(short))
    estimated = taken * config.edit.steps / short
    if short == config.edit.steps or estimated > seconds:
        return estimated / count, count, short < config.edit.steps
    return meter.timed(lambda: sampled(config.edit.steps)) / count, count, False
