"""fit(): trains an adapter from a photo and a target prompt, and stores it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from ..adapters.adapter import Adapter
from ..adapters.full import check_master_weights
from ..adapters.modes import MODES
from ..adapters.store import Store
from ..adapters.writing import writable
from ..bases.altered import check_unaltered
from ..bases.architecture import LARGE_ENCODERS, Architecture
from ..bases.base import Base
from ..bases.loading.registry import architecture_of, load_base
from ..core.config import RunConfig
from ..core.errors import ImagicError, ImagicWarning
from ..core.noise import key
from ..core.runtime import Processes, Runtime, free_memory, reset_peak_memory, resolve_runtime
from ..memory.limits import check_disk, check_memory
from ..memory.out_of_memory import assumed_from, explain_out_of_memory
from ..photos.reading import read_photo
from ..photos.region import Region
from ..sampling.checks import check_prompt, check_sampling
from .embed import embed_stage, optimised
from .optimizers import check_single_process
from .resuming.checkpoints import START_OVER, Checkpoint, Checkpoints
from .resuming.stages import ResumableStages, stop_while_sampling
from .run import encode_run
from .stage import StepReport
from .tune import tune_stage

Value = TypeVar("Value")


def open_base(config: RunConfig, runtime: Runtime | None = None) -> Base:
    """Opens the base of a run, in the precision that its training mode needs.

    Args:
        config: the settings of the run.
        runtime: device and precision; resolved from ``config.memory`` by default.

    Raises:
        ImagicError: the base does not exist, or the run does not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    architecture = architecture_of(config.base, config.revision)
    architecture.check_trainable(config.base)
    _check_space(architecture, config)
    check_memory(architecture, config, free_memory(runtime.device), assumed_from(runtime))
    return load_base(config.base, runtime, config.revision, master_weights=MODES[config.tune.mode].in_base)


def fit(
    image: Path,
    prompt: str,
    config: RunConfig,
    store: Store,
    name: str,
    *,
    base: Base | None = None,
    overwrite: bool = False,
    resume: bool = False,
    region: Region | None = None,
    store_photo: bool = True,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> Generator[StepReport, None, Adapter | None]:
    """Runs the training stages, renders a preview, and stores the adapter (Imagic, arXiv 2210.09276). Mode embedding has no stage 2.

    A generator that :func:`result` runs to its end. It saves checkpoints regularly, at the end of each stage, when ``stop`` returns True
    and when it is closed. If the preview does not fit the memory, the adapter is stored without one, with a warning.

    Args:
        image: path of the photo.
        prompt: the target prompt, which describes the edited photo.
        config: the settings of the run.
        store, name: where the adapter and the checkpoints are written.
        base: a loaded base, which is bit-equal to before afterwards; by default the base of ``config`` is opened and released again.
        overwrite: replaces an adapter and an unfinished fit of the same name.
        resume: continues from the newest intact checkpoint of that name. On the CPU, with the same number of threads, the result is
            byte-identical to that of an uninterrupted run.
        region: the part of the photo to fit, which edits are pasted into; all of it by default.
        store_photo: whether the adapter keeps the photo's file, which edits are pasted into.
        stop: called after every step; with several processes all stop after the same step.
        processes: the processes that share the batch; one process by default.

    Yields:
        A report after every step.

    Returns:
        The adapter, or None on processes other than the main one, which do not write.

    Raises:
        Stopped: ``stop`` returned True; a checkpoint is saved.
        ImagicError: an argument is invalid, memory or disk space is too small, there is nothing to resume, or a number is not finite.
    """
    processes = processes or Processes()
    check_prompt(prompt)
    check_sampling(config.edit)
    saved = Checkpoints(store.checkpoints(name))
    with store.locked(name) if processes.main else nullcontext(store) as store:
        if processes.main:
            _check_name(store, name, saved, overwrite, resume)
        checkpoint = _checkpoint_to_resume(saved, name, processes) if resume else None
        photo = read_photo(image)
        if region:
            region.check_inside(photo.image.size)
        stored = len(photo.data) if store_photo else 0
        opened, config = _open_checked(base, config, processes, store, saved, stored)
        run = encode_run(config, opened, photo, prompt, processes, region, store_photo)
        if processes.main and not resume:
            with writable(store.root):
                saved.clear()  # not before every check has passed
        stages = ResumableStages(run, saved, stop)
        adapter = yield from _train_and_store(stages, checkpoint, store, name, overwrite, restore=base is not None)
        if processes.main:
            try:
                saved.clear()
            except (OSError, ImagicError) as error:  # the adapter is stored
                warnings.warn(f"the checkpoints of {name} remain: {error}", ImagicWarning, stacklevel=2)
    return adapter


def _check_space(architecture: Architecture, config: RunConfig) -> None:
    """Raises ImagicError if text encoders would be moved while stage 1 trains through them."""
    moves = any(architecture.encoder_classes[name] in LARGE_ENCODERS for name in architecture.text_encoders)
    if config.embed.space == "input" and moves and config.memory.idle != "keep":
        got = f"--embed.space input together with --idle {config.memory.idle}, with a base that has a large text encoder"
        raise ImagicError(got, "text encoders that stay on the device: --idle keep", "change --idle, or use --embed.space output")


def _open_checked(
    base: Base | None, config: RunConfig, processes: Processes, store: Store, saved: Checkpoints, photo: int
) -> tuple[Base, RunConfig]:
    """Returns the opened base and the settings with its memory levers, and checks both before training starts."""
    if base is None:
        base = open_base(config)
    else:
        check_unaltered(base)
        base.architecture.check_trainable(base.name)
        _check_space(base.architecture, config.model_copy(update={"memory": base.runtime.memory}))
        config = config.model_copy(update={"memory": base.runtime.memory})
    if config.tune.mode == "lora":
        base.lora_targets(config.tune.targets)  # raises for layers that the denoiser does not have
    if config.memory.optimizer_in_backward:
        check_single_process(processes)
    if MODES[config.tune.mode].in_base:
        check_master_weights(base)
    if processes.main:
        check_disk(base.architecture, config, assumed_from(base.runtime), store.root, saved.size, photo)
    reset_peak_memory(base.runtime.device)
    return base, config


def _train_and_store(
    stages: ResumableStages, checkpoint: Checkpoint | None, store: Store, name: str, overwrite: bool, restore: bool
) -> Generator[StepReport, None, Adapter | None]:
    """Runs the stages, resuming from the checkpoint if there is one; the main process renders the preview and stores the adapter."""
    run = stages.run
    base, config, processes = run.base, run.config, run.processes
    e_opt, start = stages.resume(checkpoint) if checkpoint else (None, 0)
    with explain_out_of_memory(base.architecture, config, base.runtime, "embed"):
        run.convergence.measure_frozen(base, run.latents, run.target, processes)
    if e_opt is None:
        embed = embed_stage(base, run.latents, run.target, config.embed, config.seed, processes, run.prompt)
        yield from stages.run_stage(embed, start, checkpoint)
        e_opt, start, checkpoint = optimised(embed, run.target if config.embed.stores_difference else None), 0, None
        del embed
    base.offload_encoders()
    with MODES[config.tune.mode].trainables(base, config.tune, key(config.seed, "lora"), restore) as parameters:
        if "tune" in config.stages:
            tune = tune_stage(base, run.latents, e_opt, parameters, config.tune, config.seed, processes)
            optimised_tensors = {f"optimised/{name}": value for name, value in e_opt.tensors().items()}
            yield from stages.run_stage(tune, start, checkpoint, optimised_tensors)
            del tune, checkpoint  # frees the optimizer states before the preview needs memory
        if not processes.main:
            return None
        with stop_while_sampling(base, stages.is_stopping, stages.saved_message):
            preview = run.preview(e_opt)
        return store.write(run.record(name), lambda writer: run.write_files(writer, e_opt, preview), overwrite)


def _check_name(store: Store, name: str, saved: Checkpoints, overwrite: bool, resume: bool) -> None:
    """Raises ImagicError if the name belongs to an adapter or an unfinished fit that is neither resumed nor overwritten."""
    store.check_free(name, overwrite)
    if saved.any() and not resume and not overwrite:
        got = f"an unfinished fit of {name} is in {saved.folder}"
        raise ImagicError(got, "a choice between continuing it and starting over", "add --resume, or --overwrite")


def _checkpoint_to_resume(saved: Checkpoints, name: str, processes: Processes) -> Checkpoint:
    checkpoint = saved.newest(rename_broken=processes.main)
    if checkpoint is not None:
        return checkpoint
    if saved.any():
        raise ImagicError(f"there is no intact checkpoint of {name} to resume", "at least one intact checkpoint", START_OVER)
    raise ImagicError(f"there is no checkpoint of {name} to resume", "an interrupted fit", "leave out --resume to start a new fit")


def result(steps: Generator[StepReport, None, Value]) -> Value:
    """Runs a fit to its end and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
