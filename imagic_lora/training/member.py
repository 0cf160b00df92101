"""The fit of one photo of a group that is fitted together."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from ..adapters.adapter import Adapter
from ..adapters.batched import copy_into
from ..adapters.modes import MODES
from ..adapters.store import Store
from ..core.config import RunConfig
from ..core.noise import key
from ..photos.canvas import Canvas
from ..photos.reading import Photo
from .fit import Embedded, embed, preview, tune
from .grouping import Item
from .resuming.checkpoints import Checkpoint, Checkpoints
from .resuming.stages import ResumableStages
from .resuming.unfinished import clear
from .stage import Progress


@dataclass(eq=False)
class Member:
    """The fit of one photo of a group. What is None comes in the course of the fit."""

    item: Item
    config: RunConfig
    store: Store
    saved: Checkpoints
    checkpoint: Checkpoint | None
    photo: Photo
    lock: ExitStack
    encoded: tuple[Canvas, Tensor] | None = None
    stages: ResumableStages | None = None
    embedded: Embedded | None = None
    layers: dict[str, Parameter] = field(default_factory=dict)

    @property
    def begun(self) -> ResumableStages:
        """The stages of the fit, once its photo and prompt are encoded."""
        assert self.stages is not None
        return self.stages

    def embed(self) -> Generator[Progress, None, None]:
        """Runs stage 1."""
        checkpoint, self.checkpoint = self.checkpoint, None
        self.embedded = yield from embed(self.begun, checkpoint)

    def tune(self) -> Generator[Progress, None, None]:
        """Runs stage 2."""
        assert self.embedded is not None
        yield from tune(self.begun, self.embedded, self.layers)

    def preview(self) -> Image.Image:
        """Renders the preview, with the trained layers applied."""
        assert self.embedded is not None
        return preview(self.begun, self.embedded.e_opt)

    def finish(self, sheet: Image.Image) -> Adapter:
        """Stores the adapter."""
        assert self.embedded is not None
        run, e_opt, tune_config = self.begun.run, self.embedded.e_opt, self.config.tune
        with MODES[tune_config.mode].trainables(run.base, tune_config, key(self.config.seed, "lora"), True) as layers:
            copy_into(layers, self.layers)  # so that the files are written by the code of a fit alone
            adapter = self.store.write(run.record(self.item.name), lambda w: run.write_files(w, e_opt, sheet), self.item.overwrite)
        clear(self.saved, self.item.name)
        self.lock.close()
        return adapter
