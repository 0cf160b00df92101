"""fit(): a photo and a sentence to a stored adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from .bases.base import Base
from .bases.registry import locate, open_base
from .conditioning import Conditioning, interpolate
from .config import RunConfig, TuneConfig
from .errors import ImagicError
from .full import refuse_half, save_full, unfrozen
from .generate import generate, refuse_empty, refuse_no_steps
from .images import Canvas, Photo, read_photo, sheet, to_canvas, to_image, write_png
from .lora import attached, save_lora
from .memory import counted_bytes, refuse_if_too_large
from .optimizers import refuse_missing
from .runtime import Processes, Runtime, key, peak_memory, reset_peak_memory, resolve_runtime
from .stages.embed import embed_stage, optimised
from .stages.stage import Stage, StepReport, train
from .stages.tune import tune_stage
from .store import CARD, PREVIEW, SOURCE, STEPS, Adapter, BaseRecord, Record, SourceRecord, Store, save_embeddings, weights_record

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
Value = TypeVar("Value")


def open_for(config: RunConfig, runtime: Runtime | None = None) -> Base:
    """The base of a run, in the precision its mode needs.

    Raises:
        ImagicError: no such base, or the weights alone do not fit the free memory.
    """
    runtime = runtime or resolve_runtime(config.memory)
    folder, mode = locate(config.base, config.revision), config.tune.mode
    refuse_if_too_large(counted_bytes(folder, "unet", mode, runtime, runtime.optimizer(config.tune.optimizer)), runtime, mode)
    return open_base(config.base, runtime, config.revision, master_weights=mode == "full")


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
    left bit-equal to before.

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
    base = base or open_for(config)
    for stage in (config.embed, config.tune):
        refuse_missing(base.runtime.optimizer(stage.optimizer))
    if config.tune.mode == "full":
        refuse_half(base)
    reset_peak_memory(base.runtime.device)
    run = _Run(config, base, photo, prompt, processes)
    embed = run.embed_stage()
    yield from run.follow(embed)
    e_opt = optimised(embed)
    with run.trainables() as parameters:
        tune = tune_stage(run.base, run.latents, e_opt, parameters, config.tune, config.seed, processes)
        yield from run.follow(tune)
        if not processes.main:
            return None
        preview = run.preview(e_opt)
        return store.write(run.record(name), lambda folder: run.fill(folder, e_opt, preview), overwrite)


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
        self.latents = base.encode_image(self.canvas.pixels)
        if not self.latents.isfinite().all():
            raise ImagicError("the photo's latents are not finite", "finite values", "try --dtype fp32 or bf16")
        self.target = base.encode_text(self.prompt)
        self.null = base.null()

    def embed_stage(self) -> Stage:
        return embed_stage(self.base, self.latents, self.target, self.config.embed, self.config.seed, self.processes)

    def trainables(self) -> AbstractContextManager[dict[str, Parameter]]:
        tune: TuneConfig = self.config.tune
        if tune.mode == "full":
            return unfrozen(self.base)
        return attached(self.base, tune, key(self.config.seed, "lora"))

    def follow(self, stage: Stage) -> Iterator[StepReport]:
        """Passes the reports of a stage on, keeping its losses and its time."""
        losses = self.losses.setdefault(stage.name, [])
        start = time.perf_counter()
        for report in train(stage):
            losses.append(report.loss)
            yield report
        self.seconds[stage.name] = round(time.perf_counter() - start, 3)

    def preview(self, e_opt: Conditioning) -> Image.Image:
        """The photo, its reconstruction at eta 0, and the edit."""
        etas = (0.0, self.config.eta)
        mixes = [interpolate(self.target, e_opt, eta) for eta in etas]
        pictures = generate(self.base, mixes, [self.config.seed] * 2, self.config.edit, self.canvas, self.null)
        labels = [f"eta {eta:g}" for eta in etas]
        return sheet([[("photo", self.photo.image), *zip(labels, pictures, strict=True)]], self.prompt)

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
