"""adapter.json, version 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.config import Mode, RunConfig
from .atomic import FileName, Manifest, Sha256

RECORD, EMBEDDINGS, SOURCE, PREVIEW, STEPS, CARD = (
    "adapter.json", "embeddings.safetensors", "source.png", "preview.png", "steps.jsonl", "README.md",
)  # fmt: skip

REMEDY = "fit or copy the adapter again"

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"

Name = Annotated[str, Field(pattern=NAME.replace(r"\Z", "$"))]


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


class Record(Manifest):
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
