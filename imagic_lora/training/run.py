"""One fit's photo, sentence and base, encoded; and what it leaves in the store."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.atomic import AtomicWriter
from ..adapters.card import card
from ..adapters.contents import save_embeddings, weights_record
from ..adapters.full import save_full
from ..adapters.lora import save_lora
from ..adapters.record import CARD, PREVIEW, SOURCE, STEPS, BaseRecord, Record, SourceRecord
from ..bases.base import Base
from ..core.conditioning import Conditioning, interpolate, source_conditionings
from ..core.config import RunConfig
from ..core.errors import ImagicWarning
from ..core.runtime import Processes, peak_memory
from ..core.tensors import check_finite
from ..memory.limits import OutOfMemory
from ..memory.out_of_memory import explain_out_of_memory
from ..photos.canvas import Canvas, to_canvas, to_image
from ..photos.png import png
from ..photos.reading import Photo
from ..photos.sheet import sheet
from ..sampling.checks import check_scheduler_steps
from ..sampling.generate import generate

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")


@dataclass
class Run:
    """What the parts of one fit share: its inputs, encoded, and its losses and seconds so far by stage.

    Args:
        canvas: the photo as the model sees it.
        latents: of the photo, ``[1, C, h, w]``.
        target: the conditioning of the target prompt.
        null: the unconditional one, where the base is guided by it.
    """

    config: RunConfig
    base: Base
    photo: Photo
    prompt: str
    processes: Processes
    canvas: Canvas
    latents: Tensor
    target: Conditioning
    null: Conditioning | None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def inputs(self, stage: str, finished: bool) -> dict[str, Any]:
        """All that a stage's state depends on, by name; levers that do not touch the numbers are not among it."""
        config, runtime = self.config, self.base.runtime
        found: dict[str, Any] = {
            "photo": self.photo.sha256,
            "prompt": self.prompt,
            "base": self.base.fingerprint,
            "seed": config.seed,
            "latents": list(self.latents.shape),
            "precision": str(runtime.dtype).removeprefix("torch."),
            "processes": self.processes.count,
            "embed": config.embed.model_dump(mode="json"),
        }
        if self.base.architecture.embeds_guidance:
            found["guidance_scale"] = config.edit.guidance_scale
        weights = {"master_weights": runtime.memory.master_weights, "quantize": runtime.memory.quantize}
        if stage == "tune":
            found |= weights | {"tune": config.tune.model_dump(mode="json")}
        return found if finished else found | weights | {"optimizer": runtime.optimizer}

    def preview(self, e_opt: Conditioning) -> Image.Image:
        """The photo, its reconstruction at eta 0, and the edit; the photo alone where memory does not reach for more."""
        etas = (0.0, self.config.eta)
        mixes = [interpolate(self.target, e_opt, eta) for eta in etas]
        cells = [("photo", self.photo.image)]
        try:
            with explain_out_of_memory(self.base.architecture, self.config, self.base.runtime, "decode"):
                of_photo, seeds = source_conditionings(self.target, e_opt, etas, self.config.edit.source_eta), [self.config.seed] * 2
                pictures = list(generate(self.base, mixes, seeds, self.config.edit, self.canvas, self.null, of_photo))
            cells += [(f"eta {eta:g}", picture) for eta, picture in zip(etas, pictures, strict=True)]
        except OutOfMemory as error:
            warnings.warn(f"the adapter is stored without a preview: {error}", ImagicWarning, stacklevel=2)
        return sheet([cells], self.prompt)

    def fill(self, writer: AtomicWriter, e_opt: Conditioning, preview: Image.Image) -> None:
        """Every file of the adapter but its record."""
        (save_full if self.config.tune.mode == "full" else save_lora)(self.base, writer)
        named = {"target": self.target, "optimised": e_opt}
        save_embeddings(writer, named if self.null is None else {**named, "null": self.null})
        writer.write(SOURCE, [png(to_image(self.canvas.pixels[0]), {})])
        writer.write(PREVIEW, [png(preview, {"prompt": self.prompt})])
        lines = [
            json.dumps({"stage": stage, "step": k + 1, "loss": round(loss, 6)})
            for stage, losses in self.losses.items()
            for k, loss in enumerate(torch.stack(losses).tolist())
        ]
        writer.write(STEPS, ["\n".join([*lines, ""]).encode()])
        writer.write(CARD, [card(self.prompt, self.base.name, self.config).encode()])

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


def encode_run(config: RunConfig, base: Base, photo: Photo, prompt: str, processes: Processes) -> Run:
    """Encodes photo and prompt, then offloads the encoders.

    Raises:
        ImagicError: a scheduler without so many steps, too little memory, or an encoder that returns numbers that are not finite.
    """
    check_scheduler_steps(base, config.edit)
    canvas = to_canvas(photo.image, config.resolution or base.resolution, base.size_multiple)
    with explain_out_of_memory(base.architecture, config, base.runtime, "encode"):
        latents = base.encode_image(canvas.pixels)
    high, wide = canvas.pixels.shape[2:]
    scale = config.edit.guidance_scale
    target, null = base.with_added_conditions(base.encode_prompt(prompt), high, wide, scale), base.null()
    null = None if null is None else base.with_added_conditions(null, high, wide, scale)
    named = {"the sentence's embedding": target, **({"the empty sentence's embedding": null} if null else {})}
    embeddings = {f"{name} ({part})": value for name, one in named.items() for part, value in one.tensors().items()}
    check_finite({"the photo's latents": latents, **embeddings})
    base.offload_encoders()
    return Run(config, base, photo, prompt, processes, canvas, latents, target, null)


def _ends(losses: Tensor) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    tenth = max(1, len(losses) // 10)
    return round(losses[:tenth].mean().item(), 6), round(losses[-tenth:].mean().item(), 6)
