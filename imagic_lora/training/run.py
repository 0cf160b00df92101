"""The state of one fit: its encoded inputs, what its stages depend on, and the adapter files that it writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.atomic import AtomicWriter
from ..adapters.card import card
from ..adapters.contents import record_parts, save_embeddings
from ..adapters.modes import MODES
from ..adapters.record import CARD, CONVERGENCE, PHOTO, PREVIEW, PREVIEWS, SOURCE, STEPS, BaseRecord, Record, SourceRecord, StageRecord
from ..adapters.word import NewWord, save_word
from ..bases.base import Base
from ..bases.loading.known import licence_of
from ..core.conditioning import Conditioning
from ..core.config import RunConfig
from ..core.environment import library_versions
from ..core.errors import ImagicWarning
from ..core.runtime import Processes, peak_memory
from ..memory.limits import OutOfMemory
from ..memory.out_of_memory import explain_out_of_memory
from ..photos.canvas import Canvas, to_image
from ..photos.png import png
from ..photos.reading import Photo
from ..photos.region import Region
from ..photos.sheet import sheet
from ..sampling.generate import generate
from ..sampling.mixing import mixtures
from .monitoring.convergence import Convergence
from .monitoring.previews import Previews
from .stage import optimizer_of


@dataclass
class Run:
    """The shared state of one fit: its encoded inputs, and the losses and durations of its stages so far.

    Args:
        config: the settings of the run.
        base: the base that is trained.
        photo: the photo as it was read.
        others: further photos of method dreambooth or textual-inversion.
        region: the part of the photo that is fitted; None is all of it.
        store_photo: whether the adapter keeps the photo's file.
        prompt: the target prompt.
        processes: the processes that share the batch.
        canvas: the photo, or its region, resized and padded to the resolution of the base.
        latents: latents of the photos, ``[N, C, h, w]``; those of method imagic have one.
        target: conditioning of the target prompt.
        null: unconditional conditioning, or None if the base has no classifier-free guidance.
        negative: what the guidance of the preview leads away from.
        convergence: the relative losses so far.
        previews: the previews of stage 2 so far.
        losses: losses of every stage so far, one scalar tensor per step.
        seconds: duration of every stage so far.
        word: the new word of textual inversion, with its first vectors before the training and what was found after it.
        class_pictures: hash of the class pictures of DreamBooth, if there are any.
        together: number of photos whose fits share the calls of the denoiser with this one, itself included.
    """

    config: RunConfig
    base: Base
    photo: Photo
    region: Region | None
    store_photo: bool
    prompt: str
    processes: Processes
    canvas: Canvas
    latents: Tensor
    target: Conditioning
    null: Conditioning | None
    negative: Conditioning | None
    convergence: Convergence
    previews: Previews
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    others: Sequence[Photo] = ()
    word: NewWord | None = None
    class_pictures: str | None = None
    together: int = 1

    @property
    def shared(self) -> bool:
        """Whether the stages yield their batches, for calls of the denoiser that several fits share."""
        return self.together > 1

    def inputs(self, stage: str, finished: bool) -> dict[str, Any]:
        """Returns everything that the state of a stage depends on; memory levers that do not change the result are excluded.

        Args:
            stage: ``embed`` or ``tune``.
            finished: whether the stage is finished; the state of a finished stage no longer depends on the optimizer.
        """
        config, runtime = self.config, self.base.runtime
        early = [name for name in ("embed", stage) if config.stops_early(name)]
        inputs: dict[str, Any] = {
            "photo": self.photo.sha256,
            "prompt": self.prompt,
            "base": self.base.fingerprint,
            "seed": config.seed,
            "latents": list(self.latents.shape),
            "precision": str(runtime.dtype).removeprefix("torch."),
            "processes": self.processes.count,
            "embed": config.embed.model_dump(mode="json"),
        }
        if self.region:
            inputs["region"] = list(self.region)
        if config.method != "imagic":
            inputs["method"] = config.method
            inputs["photos"] = [photo.sha256 for photo in self.others]
            inputs["own"] = (config.dreambooth if config.method == "dreambooth" else config.inversion).model_dump(mode="json")
        if self.class_pictures:
            inputs["class_pictures"] = self.class_pictures
        if early:
            evaluated = config.monitoring.model_dump(include={"convergence_every", "patience", "min_improvement"})
            inputs["early_stop"] = {"stages": list(dict.fromkeys(early)), **evaluated}
        if self.base.architecture.guidance == "embedded":
            inputs["guidance_scale"] = config.edit.guidance_scale
        weights = {"master_weights": runtime.memory.master_weights, "quantize": runtime.memory.quantize}
        if runtime.memory.quantize_text != "none":
            inputs["quantize_text"] = runtime.memory.quantize_text
        if stage == "tune":
            inputs |= weights | {"tune": config.tune.model_dump(mode="json")}
        return inputs if finished else inputs | weights | {"optimizer": optimizer_of(stage, runtime)}

    @property
    def fitted_photo(self) -> Image.Image:
        """The photo, or its region, at its original size."""
        return self.photo.image.crop(self.region.box) if self.region else self.photo.image

    def preview(self, e_opt: Conditioning) -> Image.Image:
        """Returns the preview sheet: the photo, its reconstruction at eta 0, and the edit at the configured eta; or the photo and an image
        of the prompt, for a method without eta.

        If memory runs out, the sheet holds only the photo, and a warning is issued.
        """
        imagic = self.config.method == "imagic"
        etas = (0.0, self.config.eta) if imagic else (1.0,)
        cells = [("photo", self.fitted_photo)]
        try:
            with explain_out_of_memory(self.base.architecture, self.config, self.base.runtime, "decode"):
                images = self.images(e_opt, etas)
            cells += [(f"eta {eta:g}" if imagic else "prompt", image) for eta, image in zip(etas, images, strict=True)]
        except OutOfMemory as error:
            warnings.warn(f"the adapter is stored without a preview: {error}", ImagicWarning, stacklevel=2)
        return sheet([cells], self.prompt)

    def images(self, e_opt: Conditioning, etas: Sequence[float]) -> list[Image.Image]:
        """Generates an image at each eta with the seed and the sampling settings of the run.

        Args:
            e_opt: the optimised embedding.
            etas: interpolation weights.
        """
        config = self.config
        conditionings, sources = mixtures(self.base, self.prompt, self.target, e_opt, etas, config.edit)
        self.base.offload_encoders()  # which may have encoded the vectors of the mixtures
        return list(generate(self.base, conditionings, [config.seed] * len(etas), config.edit, self.canvas, self.negative, sources))

    def previews_png(self) -> bytes | None:
        """Returns the sheet of all previews of stage 2 as a PNG file; None if there are none."""
        picture = self.previews.picture(self.prompt, self.fitted_photo)
        return None if picture is None else png(picture, {"prompt": self.prompt})

    def write_files(self, writer: AtomicWriter, e_opt: Conditioning, preview: Image.Image) -> None:
        """Writes every file of the adapter except its record.

        Args:
            writer: writes into the folder of the adapter.
            e_opt: the optimised embedding.
            preview: the preview sheet.
        """
        MODES[self.config.tune.mode].save(self.base, writer)
        if self.word:
            save_word(writer, self.word)
        embeddings = {"target": self.target, "optimised": e_opt}
        embeddings = embeddings if self.null is None else {**embeddings, "null": self.null}
        save_embeddings(writer, embeddings, self.config.embed.stores_difference)
        writer.write(SOURCE, [png(to_image(self.canvas.pixels[0]), {})])
        if file := self._photo_file:
            writer.write(file, [self.photo.data])
        writer.write(PREVIEW, [png(preview, {"prompt": self.prompt})])
        if previews := self.previews_png():
            writer.write(PREVIEWS, [previews])
        if convergence := self.convergence.picture():
            writer.write(CONVERGENCE, [png(convergence, {"prompt": self.prompt})])
        writer.write(STEPS, ["".join(f"{json.dumps(line)}\n" for line in self._step_lines()).encode()])
        writer.write(CARD, [card(self.prompt, self.base.name, self.config, licence_of(self.base.name, self.base.revision)).encode()])

    def _step_lines(self) -> Iterator[dict[str, Any]]:
        """Yields the losses of every step, in the order of the steps."""
        for stage, losses in self.losses.items():
            relative = self.convergence.values.get(stage, {})
            for step, loss in enumerate(torch.stack(losses).tolist(), start=1):
                evaluated = {"relative_loss": round(relative[step], 6)} if step in relative else {}
                yield {"stage": stage, "step": step, "loss": round(loss, 6), **evaluated}

    def _stage_record(self, stage: str) -> StageRecord:
        """Returns how a finished stage went."""
        asked, done = self.config.stages[stage].steps, len(self.losses[stage])
        relative = self.convergence.values.get(stage, {}).get(done)
        ended = "steps" if done == asked else "early stop"
        return StageRecord(asked=asked, done=done, ended=ended, relative_loss=None if relative is None else round(relative, 6))

    def record(self, name: str) -> Record:
        """Returns the record of the adapter, without the hashes of its files.

        Args:
            name: name of the adapter in the store.
        """
        base, config = self.base, self.config
        together = {"together": str(self.together)} if self.shared else {}  # the times and the memory are those of all photos
        return Record(
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
            parts=record_parts(base, config.tune.mode),
            prompt=self.prompt,
            config=config,
            source=SourceRecord(
                sha256=self.photo.sha256,
                size=self.photo.image.size,
                box=self.canvas.box,
                region=self.region,
                file=self._photo_file,
                others=[photo.sha256 for photo in self.others],
            ),
            losses={stage: _first_and_last_loss(torch.stack(losses)) for stage, losses in self.losses.items()},
            seconds=self.seconds,
            stages={stage: self._stage_record(stage) for stage in self.losses},
            runtime=base.runtime.reasons | {"processes": str(self.processes.count)} | together,
            peak_memory=peak_memory(base.runtime.device),
            versions=library_versions(),
        )

    @property
    def _photo_file(self) -> str | None:
        """The name of the photo's file in the adapter, if it is stored."""
        return f"{PHOTO}{self.photo.suffix}" if self.store_photo else None


def _first_and_last_loss(losses: Tensor) -> tuple[float, float]:
    """Returns the mean losses over the first and the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return round(losses[:tenth].mean().item(), 6), round(losses[-tenth:].mean().item(), 6)
