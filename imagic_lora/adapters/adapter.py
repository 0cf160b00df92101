"""A stored adapter: its record, what is read out of it, and what is not believed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import Mode, RunConfig
from ..core.errors import ImagicError
from ..core.tensors import encoded, read
from ..photos.canvas import Canvas, to_pixels
from ..photos.reading import MAX_PIXELS, read_photo
from .atomic import Draft, FileName, Sealed, Sha256, unsealed
from .full import loaded_full, saved_full
from .lora import Layers, loaded_lora, read_lora, saved_lora

RECORD, EMBEDDINGS, SOURCE, PREVIEW, STEPS, CARD = (
    "adapter.json", "embeddings.safetensors", "source.png", "preview.png", "steps.jsonl", "README.md",
)  # fmt: skip
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"
Name = Annotated[str, Field(pattern=NAME.replace(r"\Z", "$"))]
_REMEDY = "fit or copy the adapter again"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Part):
    """The base that an adapter belongs to."""

    name: str
    revision: str | None
    fingerprint: str


class WeightsRecord(_Part):
    """What was trained: a component, how, and the files that hold it."""

    component: Literal["unet", "transformer"]
    mode: Mode
    files: list[FileName]


class SourceRecord(_Part):
    """The photo: hash of its file, its size, and where it lies on the canvas that ``source.png`` holds."""

    sha256: Sha256
    size: tuple[int, int]
    box: tuple[int, int, int, int]


class CompressedRecord(_Part):
    """What was compressed: a full adapter, and the norm of what was lost over the norm of all that it had changed."""

    name: Name
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(Sealed):
    """``adapter.json``, version 1: how an adapter was made, and the hash of every other file.

    Losses are the mean of the first and of the last tenth of each stage; ``runtime`` is what ``auto`` came to; ``peak_memory`` is in
    bytes. ``compressed`` is there only where that was done.
    """

    version: Literal[1] = 1
    name: Name
    created: str
    base: BaseRecord
    parts: list[WeightsRecord]
    prompt: str
    config: RunConfig
    source: SourceRecord
    losses: dict[str, tuple[float, float]]
    seconds: dict[str, float]
    runtime: dict[str, str]
    peak_memory: int
    versions: dict[str, str]
    compressed: Annotated[CompressedRecord | None, Field(exclude_if=lambda one: one is None)] = None


class Adapter:
    """A stored adapter: its folder and its record."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @property
    def name(self) -> str:
        """What it is called in its store, whatever its record says."""
        return self.folder.name

    @property
    def size(self) -> int:
        """Bytes of the trained weights and the embeddings."""
        files = [self.folder / file for part in self.record.parts for file in (*part.files, EMBEDDINGS)]
        return sum(file.stat().st_size for file in files if file.is_file())

    def embeddings(self) -> dict[str, Conditioning]:
        """``target``, ``optimised`` and, where the base has one, ``null``.

        Raises:
            ImagicError: the file holds anything else.
        """
        groups: dict[str, dict] = {}
        for key, value in read(self.listed(EMBEDDINGS)).items():
            kind, _, name = key.partition(".")
            groups.setdefault(kind, {})[name] = value.float()
        forms = [{name: value.shape for name, value in named.items()} for named in groups.values()]
        kinds, whole = set(groups), all("tokens" in form and form == forms[0] for form in forms)
        if not whole or not {"target", "optimised"} <= kinds <= {"target", "optimised", "null"}:
            held = ", ".join(sorted(kinds))[:200]
            raise ImagicError(f"{self.folder / EMBEDDINGS} holds {held}, or not in equal shapes", "the embeddings of one base", _REMEDY)
        return {kind: Conditioning.from_tensors(named) for kind, named in groups.items()}

    def canvas(self) -> Canvas:
        """The photo as it was trained on.

        Raises:
            ImagicError: the photo cannot be read, or does not lie where the record says.
        """
        source, image = self.record.source, read_photo(self.listed(SOURCE)).image
        (left, top, right, bottom), (width, height) = source.box, source.size
        inside = 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        if not inside or min(source.size) < 1 or width * height > MAX_PIXELS:
            got = f"a photo of {width}x{height} at {source.box} of {image.width}x{image.height} pixels"
            raise ImagicError(got, "a part of the canvas", _REMEDY)
        return Canvas(to_pixels(image), source.box, source.size)

    def refuse_foreign(self, base: Base, force: bool = False) -> None:
        """Looks at records and headers alone, before anything is loaded.

        Args:
            force: another base will do, as long as all shapes are the same.

        Raises:
            ImagicError: it was made for another base, replaces weights of a quantised one, or has a photo or embeddings of other shapes.
        """
        made_for = self.record.base
        shapes = {name: tuple(value.shape) for name, value in self.embeddings()["target"].tensors().items()}
        same = shapes == base.architecture.conditioning
        if made_for.fingerprint != base.fingerprint and not (force and same):
            remedy = "the weights have changed: fit again" if made_for.name == base.name else f"use --base {made_for.name}"
            raise ImagicError(
                f"adapter {self.name} was made for base {made_for.name}, not for {base.name}",
                "the weights it was made on" if same else "the weights it was made on: these have embeddings of other shapes",
                f"{remedy}, or edit with --force" if same else remedy,
            )
        if self.record.parts != [weights_record(base, self.record.config.tune.mode)]:
            raise ImagicError(f"adapter {self.name} lists weights under other names", "those of its mode", _REMEDY)
        if base.runtime.memory.quantize != "none" and self.record.config.tune.mode == "full":
            raise ImagicError(f"adapter {self.name} replaces every weight of a quantised base", "a plain base", "open it anew")
        high, wide = self.canvas().pixels.shape[2:]
        most, multiple = max(self.record.config.resolution or base.resolution, base.size_multiple), base.size_multiple
        if high * wide > most**2 or high % multiple or wide % multiple:
            raise ImagicError(
                f"adapter {self.name} has a canvas of {wide}x{high} pixels", f"at most {most} squared, in whole {multiple}", _REMEDY
            )
        if not same:
            raise ImagicError(f"adapter {self.name} has embeddings of shapes {shapes}", f"{base.architecture.conditioning}", _REMEDY)

    def refuse_replaced(self) -> None:
        """Raises ImagicError if what lies in its folder is no longer what its record tells of: what was read there may be of another."""
        if unsealed(self.folder, RECORD, Record) != self.record:
            raise ImagicError(f"{self.folder} holds another adapter than when it was read", "the same one", "read it again from its store")

    def layers(self, base: Base, force: bool = False) -> Layers | None:
        """Its LoRA layers, in host memory; None where it has full weights, which are large and go from the disk into the base.

        Args:
            force: as for :meth:`refuse_foreign`.

        Raises:
            ImagicError: as :meth:`refuse_foreign`; layers that do not fit the base, or are not finite.
        """
        self.refuse_foreign(base, force)
        (part,) = self.record.parts
        paths = [self.listed(file) for file in part.files]
        return read_lora(base, paths[0]) if part.mode == "lora" else None

    def worn_by(self, base: Base) -> AbstractContextManager[object]:
        """The base with this adapter's weights; bit-equal to before afterwards.

        Raises:
            ImagicError: as :meth:`layers`; full weights that do not fit the base, or are not finite.
        """
        layers = self.layers(base)
        return loaded_full(base, self.folder) if layers is None else loaded_lora(base, layers)

    def listed(self, file: str) -> Path:
        """The path of a file whose hash is on record."""
        if file not in self.record.files:
            raise ImagicError(f"{self.folder / file} is not on the adapter's record", "a file whose hash is known", _REMEDY)
        return self.folder / file


def save_embeddings(draft: Draft, named: Mapping[str, Conditioning]) -> None:
    """Writes conditionings as ``<name>.tokens``, ``<name>.pooled`` and every extra input, fp32."""
    draft.write(EMBEDDINGS, encoded({f"{kind}.{name}": t.float() for kind, c in named.items() for name, t in c.tensors().items()}))


def weights_record(base: Base, mode: Mode) -> WeightsRecord:
    """Where a base's trained weights are put."""
    return WeightsRecord(component=base.component, mode=mode, files=list((saved_lora if mode == "lora" else saved_full)(base)))
