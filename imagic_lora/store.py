"""Adapters on disk: one folder each, safetensors and JSON only, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from .bases.base import Base
from .conditioning import Conditioning
from .config import Mode, RunConfig
from .errors import ImagicError
from .full import WEIGHTS, loaded_full
from .images import Canvas, read_photo, to_pixels
from .lora import LORA_FILE, loaded_lora

RECORD, EMBEDDINGS, SOURCE, PREVIEW, STEPS, CARD = (
    "adapter.json", "embeddings.safetensors", "source.png", "preview.png", "steps.jsonl", "README.md",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
    files: list[str]


class SourceRecord(_Part):
    """The photo: hash of its file, its size, and where it lies on the canvas that ``source.png`` holds."""

    sha256: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]


class Record(_Part):
    """``adapter.json``, version 1: how an adapter was made, and the hash of every other file.

    Losses are the mean of the first and of the last tenth of each stage; ``runtime`` is what ``auto`` came to; ``peak_memory`` is in
    bytes.
    """

    version: Literal[1] = 1
    name: str
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
    files: dict[str, str] = {}


class Adapter:
    """A stored adapter: its folder and its record."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @property
    def size(self) -> int:
        """Bytes of the trained weights and the embeddings."""
        files = [self.folder / file for part in self.record.parts for file in (*part.files, EMBEDDINGS)]
        return sum(file.stat().st_size for file in files if file.is_file())

    def embeddings(self) -> dict[str, Conditioning]:
        """``target``, ``optimised`` and, where the base has one, ``null``."""
        groups: dict[str, dict] = {}
        for key, value in load_file(self.folder / EMBEDDINGS).items():
            kind, name = key.split(".", 1)
            groups.setdefault(kind, {})[name] = value
        return {kind: Conditioning.from_tensors(named) for kind, named in groups.items()}

    def canvas(self) -> Canvas:
        """The photo as it was trained on."""
        source = self.record.source
        return Canvas(to_pixels(read_photo(self.folder / SOURCE).image), source.box, source.size)

    @contextmanager
    def worn_by(self, base: Base) -> Iterator[None]:
        """The base with this adapter's weights; bit-equal to before afterwards."""
        with ExitStack() as stack:
            for part in self.record.parts:
                stack.enter_context((loaded_lora if part.mode == "lora" else loaded_full)(base, self.folder))
            yield


def save_embeddings(folder: Path, named: dict[str, Conditioning]) -> None:
    """Writes conditionings as ``<name>.tokens``, ``<name>.pooled`` and every extra input, fp32."""
    tensors = {  # copies, because a file cannot hold one tensor under two names, and target and optimised share their extra inputs
        f"{kind}.{name}": t.to("cpu", torch.float32, copy=True).contiguous() for kind, c in named.items() for name, t in c.tensors().items()
    }
    save_file(tensors, folder / EMBEDDINGS)


def weights_record(base: Base, mode: Mode) -> WeightsRecord:
    """Where :func:`~imagic_lora.lora.save_lora` and :func:`~imagic_lora.full.save_full` put a base's weights."""
    files = [LORA_FILE] if mode == "lora" else [f"{base.component}/config.json", f"{base.component}/{WEIGHTS}"]
    return WeightsRecord(component=base.component, mode=mode, files=files)


def checked_name(name: str) -> str:
    """The name, if it can be one.

    Raises:
        ImagicError: it holds a path, begins with a dot, or is empty or over 100 characters.
    """
    if not _NAME.fullmatch(name):
        raise ImagicError(f"{name!r} as a name", "letters, digits, '.', '_' and '-', at most 100, no path", "choose another --name")
    return name


class Store:
    """A folder of adapters.

    Args:
        root: made when the first adapter is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self, name: str, overwrite: bool) -> None:
        """Makes sure, before anything is trained, that an adapter of this name can be written.

        Raises:
            ImagicError: it cannot be a name, it is taken and ``overwrite`` is not given, or the folder cannot be written to.
        """
        if (self.root / checked_name(name)).exists() and not overwrite:
            raise ImagicError(f"{self.root / name} exists", "a new name", "choose another --name, or --overwrite")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()
        except OSError as error:
            raise ImagicError(
                f"{self.root} cannot be written to ({error.strerror})", "a folder to write to", "choose another --store"
            ) from error

    def names(self) -> list[str]:
        """Names of the adapters, sorted."""
        return sorted(path.parent.name for path in self.root.glob(f"[!.]*/{RECORD}"))

    def read(self, name: str, verify: bool = True) -> Adapter:
        """An adapter whose files are all there and unchanged.

        Args:
            verify: False reads the record alone, which is enough to tell of an adapter, but not to use it.

        Raises:
            ImagicError: no such adapter, a record that is not of this version, or a file that is missing or has changed.
        """
        folder = self.root / checked_name(name)
        if not (folder / RECORD).is_file():
            there = ", ".join(self.names()) or "none"
            raise ImagicError(f"no adapter {name!r} in {self.root}", f"one of its adapters ({there})", "see imagic-lora list")
        adapter = Adapter(folder, _read_record(folder / RECORD))
        for file, digest in adapter.record.files.items() if verify else ():
            if not (folder / file).is_file() or _sha256(folder / file) != digest:
                raise ImagicError(
                    f"{folder / file} is missing or has changed", "the file as it was written", "fit or copy the adapter again"
                )
        return adapter

    def write(self, record: Record, fill: Callable[[Path], None], overwrite: bool = False) -> Adapter:
        """Writes an adapter: into a hidden folder, hashed, flushed to the disk, renamed into place.

        Args:
            record: without its ``files``.
            fill: writes every other file into the folder it is given.

        Raises:
            ImagicError: the name is taken and ``overwrite`` is not given.
        """
        self.prepare(record.name, overwrite)
        final = self.root / record.name
        hidden = self.root / f".{record.name}.{os.getpid()}.part"
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        try:
            fill(hidden)
            files = {str(p.relative_to(hidden).as_posix()): _sha256(p) for p in sorted(hidden.rglob("*")) if p.is_file()}
            record = record.model_copy(update={"files": files})
            (hidden / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _flush(hidden)
            _replace(hidden, final)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return self.read(record.name)


def _read_record(path: Path) -> Record:
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ImagicError(f"{path} cannot be read ({first})", "an adapter record of version 1", "fit or copy the adapter again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Everything below a folder, and the folder itself, onto the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(hidden: Path, final: Path) -> None:
    """Renames a whole folder into place; what was there goes only afterwards."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.rename(old)
    hidden.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
