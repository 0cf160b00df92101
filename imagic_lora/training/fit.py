"""fit(): trains an adapter from a photo and a target prompt, and stores it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast, overload

from PIL import Image
from torch.nn import Parameter

from ..adapters.adapter import Adapter
from ..adapters.full import check_master_weights
from ..adapters.modes import MODES
from ..adapters.store import Store
from ..adapters.writing import writable
from ..bases.altered import check_unaltered
from ..bases.architecture import LARGE_ENCODERS, Architecture, check_fit_method
from ..bases.base import Base
from ..bases.loading.registry import architecture_of, load_base
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.noise import key
from ..core.runtime import Processes, Runtime, free_memory, reset_peak_memory, resolve_runtime
from ..memory.limits import check_disk, check_memory
from ..memory.out_of_memory import assumed_from, explain_out_of_memory
from ..photos.region import Region
from ..sampling.checks import check_sampling, check_scheduler
from .embed import embed_stage, optimised
from .encode import encode_photo, encode_run
from .inputs import check_inputs, encode_others, read_photos
from .prior import Prior, PriorStage, make_prior
from .resuming.checkpoints import Checkpoint, Checkpoints
from .resuming.interrupting import stop_while_sampling
from .resuming.stages import ResumableStages
from .resuming.unfinished import check_unfinished, checkpoint_to_resume, clear
from .stage import Progress, StepReport
from .tune import tune_stage
from .updating.updates import check_single_process
from .word import WordStage

Value = TypeVar("Value")


def open_base(config: RunConfig, runtime: Runtime | None = None, photos: int = 1) -> Base:
    """Opens the base of a run, in the precision that its training mode needs.

    Args:
        config: the settings of the run.
        runtime: device and precision; resolved from ``config.memory`` by default.
        photos: number of photos that are fitted together.

    Raises:
        ImagicError: the base does not exist, or the run does not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    architecture = architecture_of(config.base, config.revision)
    architecture.check_trainable(config.base)
    check_fit_method(architecture, config.base, config.method)
    check_space(architecture, config)
    check_memory(architecture, config, free_memory(runtime.device), assumed_from(runtime), photos)
    return load_base(config.base, runtime, config.revision, master_weights=MODES[config.tune.mode].in_base)


@overload
def fit(
    image: Path, prompt: str, config: RunConfig, store: Store, name: str, *, base: Base | None = None, overwrite: bool = False,
    resume: bool = False, region: Region | None = None, store_photo: bool = True, stop: Callable[[], bool] = ...,
    processes: None = None,
) -> Generator[StepReport, None, Adapter]: ...  # fmt: skip
@overload
def fit(
    image: Path, prompt: str, config: RunConfig, store: Store, name: str, *, base: Base | None = None, overwrite: bool = False,
    resume: bool = False, region: Region | None = None, store_photo: bool = True, stop: Callable[[], bool] = ...,
    processes: Processes | None,
) -> Generator[StepReport, None, Adapter | None]: ...  # fmt: skip
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

    Method dreambooth (arXiv 2208.12242) has stage 2 alone, beside class pictures. Method textual-inversion (arXiv 2208.01618) has stage 1
    alone, for the vectors of a new word.

    A generator that :func:`result` runs to its end. It saves checkpoints regularly, at the end of each stage, when ``stop`` returns True
    and when it is closed. If the preview does not fit the memory, the adapter is stored without one, with a warning.

    Args:
        image: path of the photo; with another method than imagic also of a folder of photos.
        prompt: the target prompt, which describes the edited photo; with another method the photos, by a rare or a new word.
        config: the settings of the run.
        store, name: where the adapter and the checkpoints are written.
        base: a loaded base, which is bit-equal to before afterwards; by default the base of ``config`` is opened and released again.
        overwrite: replaces an adapter and an unfinished fit of the same name.
        resume: continues from the newest intact checkpoint of that name. On the CPU, with the same number of threads, the result is
            byte-identical to that of an uninterrupted run.
        region: the part of the photo to fit, which edits are pasted into; all of it by default.
        store_photo: whether the adapter keeps the photo's file, which edits are pasted into; only method imagic has such edits.
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
    check_inputs(prompt, config, region)
    check_sampling(config.edit)
    saved = Checkpoints(store.checkpoints(name))
    with store.locked(name) if processes.main else nullcontext(store) as store:
        if processes.main:
            check_unfinished(store, name, saved, overwrite, resume)
        checkpoint = checkpoint_to_resume(saved, name, processes) if resume else None
        photo, *others = read_photos(image, config)
        if region:
            region.check_inside(photo.image.size)
        store_photo = store_photo and config.method == "imagic"
        stored = len(photo.data) if store_photo else 0
        opened, config = open_checked(base, config, processes)
        if processes.main:
            check_disk(opened.architecture, config, assumed_from(opened.runtime), store.root, saved.size, stored)
        run = encode_run(config, opened, photo, prompt, processes, region, store_photo, encode_photo(config, opened, photo, region))
        encode_others(run, others)
        if processes.main and not resume:
            with writable(store.root):
                saved.clear()  # not before every check has passed
        stages = ResumableStages(run, saved, stop)
        if checkpoint and config.prior:
            stages.check_inputs(checkpoint)
        prior = (yield from make_prior(run, stop)) if config.prior else None
        if not config.encodes_while_training:
            opened.offload_encoders()
        training = _train_and_store(stages, checkpoint, store, name, overwrite, base is not None, prior)
        adapter = yield from cast(Generator[StepReport, None, Adapter | None], training)  # a run by itself yields no batches
        if processes.main:
            clear(saved, name)
    return adapter


def check_space(architecture: Architecture, config: RunConfig) -> None:
    """Raises ImagicError if text encoders would be moved while stage 1 trains through them."""
    moves = any(architecture.encoder_classes[name] in LARGE_ENCODERS for name in architecture.text_encoders)
    if config.embed.space == "input" and moves and config.memory.idle != "keep":
        got = f"--embed.space input together with --idle {config.memory.idle}, with a base that has a large text encoder"
        raise ImagicError(got, "text encoders that stay on the device: --idle keep", "change --idle, or use --embed.space output")


def open_checked(base: Base | None, config: RunConfig, processes: Processes, photos: int = 1) -> tuple[Base, RunConfig]:
    """Returns the opened base and the settings with its memory levers, and checks both before training starts.

    Args:
        photos: number of photos that are fitted together.
    """
    if base is None:
        base = open_base(config, None, photos)
    else:
        check_unaltered(base)
        base.architecture.check_trainable(base.name)
        check_fit_method(base.architecture, base.name, config.method)
        check_space(base.architecture, config.model_copy(update={"memory": base.runtime.memory}))
        config = config.model_copy(update={"memory": base.runtime.memory})
    if config.tune.mode == "lora":
        base.lora_targets(config.tune.targets)  # raises for layers that the denoiser does not have
    if config.memory.optimizer_in_backward:
        check_single_process(processes)
    if MODES[config.tune.mode].in_base:
        check_master_weights(base)
    reset_peak_memory(base.runtime.device)
    check_scheduler(base, config.edit)
    return base, config


def _train_and_store(
    stages: ResumableStages, checkpoint: Checkpoint | None, store: Store, name: str, overwrite: bool, restore: bool, prior: Prior | None
) -> Generator[Progress, None, Adapter | None]:
    """Runs the stages, resuming from the checkpoint if there is one; the main process renders the preview and stores the adapter."""
    run = stages.run
    base, config = run.base, run.config
    embedded = yield from embed(stages, checkpoint)
    base.offload_encoders()
    with MODES[config.tune.mode].trainables(base, config.tune, key(config.seed, "lora"), restore) as parameters:
        if "tune" in config.stages:
            yield from tune(stages, embedded, parameters, prior)
        if not run.processes.main:
            return None
        sheet = preview(stages, embedded.e_opt)
        return store.write(run.record(name), lambda writer: run.write_files(writer, embedded.e_opt, sheet), overwrite)


@dataclass
class Embedded:
    """The result of stage 1, or the embedding of the prompt without one; and where stage 2 starts: after ``start`` steps, which are in
    ``checkpoint``."""

    e_opt: Conditioning
    start: int = 0
    checkpoint: Checkpoint | None = None


def embed(stages: ResumableStages, checkpoint: Checkpoint | None) -> Generator[Progress, None, Embedded]:
    """Stage 1 of a run, from its checkpoint if there is one; nothing is left to do if there is none, or the checkpoint is of stage 2."""
    run = stages.run
    base, config, processes = run.base, run.config, run.processes
    e_opt, start = stages.resume(checkpoint) if checkpoint else (None, 0)
    with explain_out_of_memory(base.architecture, config, base.runtime, "embed"):
        yield from run.convergence.measure_frozen(base, run.latents, run.target, processes, run.shared)
    if e_opt is not None:
        return Embedded(e_opt, start, checkpoint)
    if "embed" not in config.stages:
        return Embedded(run.target)
    if config.method == "textual-inversion":
        words = WordStage(run)
        yield from stages.run_stage(words, start, checkpoint)
        run.word = words.found()
        run.target = replace(run.word.encode(base, run.prompt), extra=run.target.extra)
        return Embedded(run.target)
    stage = embed_stage(base, run.latents, run.target, config.embed, config.seed, processes, run.prompt)
    yield from stages.run_stage(stage, start, checkpoint)
    return Embedded(optimised(stage, run.target if config.embed.stores_difference else None))


def tune(
    stages: ResumableStages, embedded: Embedded, parameters: Mapping[str, Parameter], prior: Prior | None = None
) -> Generator[Progress, None, None]:
    """Stage 2 of a run: trains ``parameters``, which belong to its denoiser, beside the class pictures if there are any."""
    run = stages.run
    inputs = run.base, run.latents, embedded.e_opt, parameters, run.config.tune, run.config.seed, run.processes
    stage = PriorStage(prior, run.config.dreambooth.prior_weight, *inputs) if prior else tune_stage(*inputs)
    checkpoint, embedded.checkpoint = embedded.checkpoint, None
    optimised_tensors = {f"optimised/{name}": value for name, value in embedded.e_opt.tensors().items()}
    yield from stages.run_stage(stage, embedded.start, checkpoint, optimised_tensors)


def preview(stages: ResumableStages, e_opt: Conditioning) -> Image.Image:
    """Renders the preview of a run; the trained weights are in the denoiser."""
    with stop_while_sampling(stages.run.base, stages.is_stopping, stages.saved_message):
        return stages.run.preview(e_opt)


def result(steps: Generator[object, None, Value]) -> Value:
    """Runs a fit to its end and returns its result.

    Args:
        steps: a :func:`fit`, or :func:`~imagic_lora.training.together.fit_together`.
    """
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
