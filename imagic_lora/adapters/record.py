"""The schema of ``adapter.json``, version 1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.config import RunConfig, TunedMode
from ..core.errors import ImagicError
from ..photos.region import Region
from .manifest import FileName, Manifest, Sha256

RECORD, EMBEDDINGS, SOURCE, PREVIEW, STEPS, CARD = (
    "adapter.json", "embeddings.safetensors", "source.png", "preview.png", "steps.jsonl", "README.md",
)  # fmt: skip

PHOTO = "photo"  # stem of the photo's file
WORD_FILES = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}
"""The files with the vectors of a new word, by text encoder."""
CONVERGENCE, PREVIEWS = "convergence.png", "previews.png"  # in adapters whose fit evaluated the relative loss, or made previews

REMEDY = "fit or copy the adapter again"

_MAX_OTHER = 2**28  # bytes of a file without weights; the largest, a photo of 4096x4096 pixels, has at most 2**26

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"

Name = Annotated[str, Field(pattern=NAME.replace(r"\Z", "$"))]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseRecord(_Part):
    """The base that an adapter was made for."""

    name: str
    revision: str | None
    fingerprint: str


class WeightsRecord(_Part):
    """The trained component of the base, the mode, and the files of the weights."""

    component: Literal["unet", "transformer"]
    mode: TunedMode
    files: list[FileName]


class WithheldRecord(_Part):
    """The canvas ``source.png`` that an adapter does not hold: width and height, the hash of the file, and that of its RGB bytes."""

    canvas: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    sha256: Sha256
    pixels: Sha256


class SourceRecord(_Part):
    """The photo: hash of its file, size (width, height) and box (left, top, right, bottom) on the canvas ``source.png``, in pixels.

    ``region`` is the part of the photo that was fitted, and is present only if that is not all of it: then the box is that of the region.
    ``file`` is the stored file of the photo; it is missing in older adapters, after ``fit --no-store-photo`` and with methods other than
    imagic. ``others`` are the hashes of further photos; then the photos are squares from their middles, and the size is that of the square.
    ``withheld`` is present in an adapter that was sent without its photo: it has no ``source.png``, no previews and no file of the photo.
    """

    sha256: Sha256
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    region: Annotated[Region | None, Field(exclude_if=lambda value: value is None)] = None
    file: Annotated[FileName | None, Field(exclude_if=lambda value: value is None)] = None
    others: Annotated[list[Sha256], Field(exclude_if=lambda value: not value)] = []
    withheld: Annotated[WithheldRecord | None, Field(exclude_if=lambda value: value is None)] = None

    @property
    def fitted(self) -> Region:
        """The part of the photo that is on the canvas: the region, or all of it."""
        return self.region or Region.whole(self.size)


class StageRecord(_Part):
    """How a training stage went: the steps that were asked for, the steps done, why it ended, and its last relative loss.

    ``ended`` is ``steps`` after the last step that was asked for, and ``early stop`` where the relative loss no longer fell.
    ``relative_loss`` is None if it was not evaluated.
    """

    asked: int
    done: int
    ended: Literal["steps", "early stop"]
    relative_loss: float | None


class CompressedRecord(_Part):
    """The full adapter that was compressed, and the norm of the lost weight change divided by the norm of the whole weight change."""

    name: Name
    error: Annotated[float, Field(ge=0)]


class EtaRecord(_Part):
    """The suggested eta, the rule that found it, and the number of seeds that it is a mean over."""

    eta: Annotated[float, Field(ge=0, le=2)]
    rule: str
    seeds: Annotated[int, Field(ge=1)]


class Record(Manifest):
    """``adapter.json``, version 1: the settings and results of the fit, and the hash of every other file.

    ``parts`` is empty in mode embedding, which trains no weights.
    ``losses`` holds the mean over the first and over the last tenth of each stage's steps. ``seconds`` holds the duration of each stage.
    ``stages`` says how each stage went; adapters of older versions have none.
    ``runtime`` holds the values that were chosen for ``auto`` settings. ``peak_memory`` is in bytes. ``compressed`` is present only in
    compressed adapters, ``suggested`` only after ``sweep --store-eta``.
    """

    MAX_BYTES: ClassVar[int] = 2**35
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
    stages: dict[str, StageRecord] = Field(default={}, exclude_if=lambda value: not value)
    runtime: dict[str, str]
    peak_memory: int
    versions: dict[str, str]
    compressed: Annotated[CompressedRecord | None, Field(exclude_if=lambda value: value is None)] = None
    suggested: Annotated[EtaRecord | None, Field(exclude_if=lambda value: value is None)] = None

    @property
    def eta(self) -> float:
        """The default eta of an edit: the suggested one, or that of the settings of the fit."""
        return self.suggested.eta if self.suggested else self.config.edit_eta

    def check_etas(self, etas: Iterable[float]) -> None:
        """Raises ImagicError for an eta other than 1 where the method of the fit does not interpolate."""
        method = self.config.method
        if method != "imagic" and (others := [eta for eta in etas if eta != 1]):
            got = f"eta {others[0]:g} with adapter {self.name} of method {method}"
            raise ImagicError(got, "no eta: this adapter makes images of a prompt", "leave out --eta, and give a --prompt")

    @property
    def weight_files(self) -> list[str]:
        """The files of the trained weights, or of the vectors of a new word; none in mode embedding of method imagic."""
        weights = [file for part in self.parts for file in part.files]
        return weights or [file for file in WORD_FILES.values() if file in self.files and self.config.method == "textual-inversion"]

    def max_bytes(self, file: str) -> int:
        return self.MAX_BYTES if file in self.weight_files else _MAX_OTHER
