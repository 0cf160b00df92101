"""fit(): a photo and a sentence to a stored adapter."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from .bases.base import Base
from .bases.registry import architecture_of, open_base
from .checkpoints import KeptEmbedding
from .conditioning import Conditioning, interpolate
from .config import RunConfig, TuneConfig
from .errors import ImagicError, ImagicWarning
from .fits import OutOfMemory, assumed_from, explained, refuse_if_too_large
from .full import refuse_half, save_full, unfrozen
from .generate import generate, refuse_empty, refuse_no_steps
from .images import Canvas, Photo, read_photo, sheet, to_canvas, to_image, write_png
from .lora import attached, save_lora
from .optimizers import refuse_several
from .runtime import Processes, Runtime, free_memory, key, peak_memory, reset_peak_memory, resolve_runtime
from .stages.embed import embed_stage, optimised
from .stages.stage import Stage, StepReport, train
from .stages.tune import tune_stage
from .store import CARD, PREVIEW, SOURCE, STEPS, Adapter, BaseRecord, Record, SourceRecord, Store, save_embeddings, weights_record

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
Value = TypeVar("Value")


def open_for(config: RunConfig, runtime: Runtime | None = None) -> Base:
    """The base of a run, in the precision its mode needs.

    Raises:
        ImagicError: no such base, or a run that does not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    refuse_if_too_large(architecture_of(config.base, config.revision), config, free_memory(runtime.device), assumed_from(runtime))
    return open_base(config.base, runtime, config.revision, master_weights=config.tune.mode == "full")


def fit(
    image: Path,
    prompt: str,
    config: RunConfig,
    store: Store,
    name: str,
    *,
    base: Base | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> Generator[StepReport, None, Adapter | None]:
    """Both training stages, a preview, and the stored adapter (Imagic, arXiv 2210.09276).

    A generator: it does its work as it is iterated, and closing it cancels. :func:`result` runs one to its end. A base that is given is
    left bit-equal to before; one that is opened here is let go afterwards.

    What was trained outlasts a lack of memory: the embedding is kept in the store for the next run of the same settings, and an adapter
    whose preview cannot be made is stored without one, with a warning.

    Args:
        image: file of the photo.
        prompt: what the edited photo shows.
        name: of the adapter in the store.
        base: already loaded; opened by ``config`` where not given.

    Yields:
        A report of every step.

    Returns:
        The adapter, or None on processes other than the main one, which do not write.

    Raises:
        ImagicError: an empty prompt, a name that is taken, a strength without steps, an unreadable photo, a base that cannot be had,
            numbers that are not finite.
    """
    processes = processes or Processes()
    refuse_empty(prompt)
    refuse_no_steps(config.edit)
    store.prepare(name, overwrite)
    photo = read_photo(image)
    restore = base is not None
    if base is None:
        base = open_for(config)
    else:
        config = config.model_copy(update={"memory": base.runtime.memory})  # it has levers of its own
    if config.memory.optimizer_in_backward:
        refuse_several(processes)
    if config.tune.mode == "full":
        refuse_half(base)
    reset_peak_memory(base.runtime.device)
    run = _Run(config, base, photo, prompt, processes)
    kept = run.kept(store, name)
    e_opt = run.recalled(kept)
    if e_opt is None:
        embed = run.embed_stage()
        yield from run.follow(embed)
        e_opt = optimised(embed)
        del embed
    with run.trainables(restore) as parameters:
        tune = tune_stage(run.base, run.latents, e_opt, parameters, config.tune, config.seed, processes)
        yield from run.follow(tune, partial(run.keep, kept, e_opt))
        del tune  # and with it the optimiser's states, before pictures need room
        if not processes.main:
            return None
        preview = run.preview(e_opt)
        adapter = store.write(run.record(name), lambda folder: run.fill(folder, e_opt, preview), overwrite)
    kept.forget()
    return adapter


def result(steps: Generator[StepReport, None, Value]) -> Value:
    """Runs a fit to its end and gives what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


@dataclass
class _Run:
    """What the parts of one fit share."""

    config: RunConfig
    base: Base
    photo: Photo
    prompt: str
    processes: Processes
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = self.base
        self.canvas: Canvas = to_canvas(self.photo.image, self.config.resolution or base.resolution, base.size_multiple)
        with explained(base.architecture, self.config, base.runtime, "encode"):
            self.latents = base.encode_image(self.canvas.pixels)
        if not self.latents.isfinite().all():
            raise ImagicError("the photo's latents are not finite", "finite values", "try --dtype fp32 or bf16")
        self.target = base.encode_text(self.prompt)
        self.null = base.null()
        base.rest()

    def embed_stage(self) -> Stage:
        return embed_stage(self.base, self.latents, self.target, self.config.embed, self.config.seed, self.processes)

    def trainables(self, restore: bool) -> AbstractContextManager[dict[str, Parameter]]:
        tune: TuneConfig = self.config.tune
        if tune.mode == "full":
            return unfrozen(self.base, restore)
        return attached(self.base, tune, key(self.config.seed, "lora"))

    def kept(self, store: Store, name: str) -> KeptEmbedding:
        """Where the embedding stage's outcome is kept, by all that it depends on but the levers that hardly touch it."""
        config, base = self.config, self.base
        inputs = [self.photo.sha256, self.prompt, base.fingerprint, config.embed.model_dump(), config.seed, tuple(self.latents.shape)]
        return KeptEmbedding(store.root, name, [*inputs, base.runtime.dtype, base.runtime.memory.vae_tiling, self.processes.count])

    def keep(self, kept: KeptEmbedding, e_opt: Conditioning) -> str:
        """Saves the embedding; says so."""
        if self.processes.main:
            kept.save(e_opt, torch.stack([loss.cpu() for loss in self.losses["embed"]]))
        return "the embedding is kept, and the same command with more levers goes on from it"

    def recalled(self, kept: KeptEmbedding) -> Conditioning | None:
        """The embedding that an earlier run of the same settings kept."""
        found = kept.load(self.base.runtime.device)
        if found is None:
            return None
        warnings.warn("the embedding that an earlier run kept is taken; stage embed is not repeated", ImagicWarning, stacklevel=2)
        e_opt, losses = found
        self.losses["embed"], self.seconds["embed"] = list(losses), 0.0
        return e_opt

    def follow(self, stage: Stage, kept: Callable[[], str] = lambda: "") -> Iterator[StepReport]:
        """Passes the reports of a stage on, keeping its losses and its time; ``kept`` saves what there is if memory runs out."""
        losses = self.losses.setdefault(stage.name, [])
        start = time.perf_counter()
        with explained(self.base.architecture, self.config, self.base.runtime, stage.name, kept):
            for report in train(stage):
                losses.append(report.loss)
                yield report
        self.seconds[stage.name] = round(time.perf_counter() - start, 3)

    def preview(self, e_opt: Conditioning) -> Image.Image:
        """The photo, its reconstruction at eta 0, and the edit; the photo alone where memory does not reach for more."""
        etas = (0.0, self.config.eta)
        mixes = [interpolate(self.target, e_opt, eta) for eta in etas]
        cells = [("photo", self.photo.image)]
        try:
            with explained(self.base.architecture, self.config, self.base.runtime, "decode"):
                pictures = list(generate(self.base, mixes, [self.config.seed] * 2, self.config.edit, self.canvas, self.null, e_opt))
            cells += [(f"eta {eta:g}", picture) for eta, picture in zip(etas, pictures, strict=True)]
        except OutOfMemory as error:
            warnings.warn(f"the adapter is stored without a preview: {error}", ImagicWarning, stacklevel=2)
        return sheet([cells], self.prompt)

    def fill(self, folder: Path, e_opt: Conditioning, preview: Image.Image) -> None:
        """Every file of the adapter but its record."""
        (save_full if self.config.tune.mode == "full" else save_lora)(self.base, folder)
        named = {"target": self.target, "optimised": e_opt}
        save_embeddings(folder, named if self.null is None else {**named, "null": self.null})
        write_png(to_image(self.canvas.pixels[0]), folder / SOURCE, {})
        write_png(preview, folder / PREVIEW, {"prompt": self.prompt})
        lines = [
            json.dumps({"stage": stage, "step": k + 1, "loss": round(loss, 6)})
            for stage, losses in self.losses.items()
            for k, loss in enumerate(torch.stack(losses).tolist())
        ]
        (folder / STEPS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / CARD).write_text(_card(folder, self.prompt, self.base.name, self.config), encoding="utf-8")

    def record(self, name: str) -> Record:
        """How the adapter was made, without the hashes of its files."""
        base, config = self.base, self.config
        return Record(
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
            parts=[weights_record(base, config.tune.mode)],
            prompt=self.prompt,
            config=config,
            source=SourceRecord(sha256=self.photo.sha256, size=self.canvas.size, box=self.canvas.box),
            losses={stage: _ends(torch.stack(losses)) for stage, losses in self.losses.items()},
            seconds=self.seconds,
            runtime=base.runtime.reasons | {"processes": str(self.processes.count)},
            peak_memory=peak_memory(base.runtime.device),
            versions={library: version(library) for library in _LIBRARIES},
        )


def _ends(losses: Tensor) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    tenth = max(1, len(losses) // 10)
    return round(losses[:tenth].mean().item(), 6), round(losses[-tenth:].mean().item(), 6)


def _card(folder: Path, prompt: str, base: str, config: RunConfig) -> str:
    """``README.md`` of an adapter; text from outside stands in indented blocks, where Markdown means nothing."""
    mode = config.tune.mode
    return "\n".join(
        [
            "# An imagic-lora adapter",
            "",
            f"Made by imagic-lora (Imagic, arXiv 2210.09276), mode {mode}, for this sentence:",
            "",
            f"    {json.dumps(prompt)}",
            "",
            "on this base:",
            "",
            f"    {json.dumps(base)}",
            "",
            "`embeddings.safetensors` holds the embeddings of the sentence (`target.tokens`) and of the photo (`optimised.tokens`).",
            "Interpolate them with eta and give the result as `prompt_embeds`; the weights load with plain diffusers:",
            "`load_lora_weights` on this folder." if mode == "lora" else "`UNet2DConditionModel.from_pretrained` on `unet/`.",
            "`adapter.json` says how it was made.",
            "",
        ]
    )
