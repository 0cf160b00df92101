"""Checkpoints on disk: written atomically, verified by hash before use, safetensors and JSON only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ...adapters.atomic import atomic_folder, remove
from ...adapters.manifest import Manifest, changed_file, read_manifest
from ...adapters.writing import delete, writable
from ...core.errors import ImagicError, ImagicWarning, unreadable
from ...core.tensors import read, safetensors_pieces

CHECKPOINT, STATE = "checkpoint.json", "state.safetensors"
START_OVER = "start over with --overwrite and without --resume"  # the remedy for a checkpoint that cannot be used
_STAGES = ("embed", "tune")


class CheckpointRecord(Manifest):
    """``checkpoint.json``, version 1.

    Args:
        stage: the stage that the checkpoint belongs to.
        step: number of finished steps of the stage.
        steps: total number of steps of the stage.
        inputs: everything that the saved state depends on; a run with different inputs cannot resume from the checkpoint.
        seconds: duration of each stage so far.
        threads: number of CPU threads of PyTorch; the last bits of the result may depend on it.
        stopped_early: whether the stage ended before its last step because the relative loss no longer fell.
    """

    version: Literal[1] = 1
    stage: Literal["embed", "tune"]
    step: int = Field(ge=1)
    steps: int = Field(ge=1, le=100_000)
    inputs: dict[str, Any]
    seconds: dict[str, float]
    threads: int
    stopped_early: Annotated[bool, Field(exclude_if=lambda value: not value)] = False

    @property
    def finished(self) -> bool:
        """Whether the stage is finished; its checkpoint then has no optimizer states."""
        return self.step == self.steps or self.stopped_early

    @model_validator(mode="after")
    def _check_step(self) -> CheckpointRecord:
        if self.step > self.steps:
            raise ValueError(f"step {self.step} is greater than the number of steps, {self.steps}")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Args:
        tensors: the state of the stage and the other saved tensors, by name.
    """

    record: CheckpointRecord
    tensors: Mapping[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors whose names start with ``prefix/``, with the prefix removed."""
        return {name.removeprefix(f"{prefix}/"): value for name, value in self.tensors.items() if name.startswith(f"{prefix}/")}


class Checkpoints:
    """The checkpoints of one fit: the newest one of each stage.

    Args:
        folder: the folder that holds the checkpoints of this fit and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, record: CheckpointRecord, tensors: Mapping[str, Tensor]) -> Path:
        """Writes a checkpoint atomically, then removes the previous checkpoint of its stage.

        Returns:
            The folder of the new checkpoint.

        Raises:
            ImagicError: a tensor is not finite, or the disk is full; the previous checkpoint still exists.
        """
        with writable(self.folder):
            pass
        final = self.folder / f"{record.stage}-{record.step:06d}"
        with atomic_folder(final) as writer:
            writer.write(STATE, safetensors_pieces(tensors))
            writer.write_manifest(CHECKPOINT, record)
        for path in self.folder.iterdir():
            if path != final and path.name.startswith((record.stage, ".")):  # interrupted writes leave folders that start with a dot
                with suppress(ImagicError):  # an older checkpoint that remains is not used
                    delete(path)
        return final

    def newest(self, rename_broken: bool = True) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None. Broken checkpoints are skipped and renamed, each with a warning.

        Args:
            rename_broken: False only skips broken checkpoints; processes other than the main one pass it.

        Raises:
            ImagicError: a broken checkpoint cannot be renamed, so that no checkpoint could be written.
        """
        for path in reversed(self._folders()):
            try:
                record = read_manifest(path, CHECKPOINT, CheckpointRecord)
                if changed := changed_file(path, record):
                    raise ImagicError(
                        f"{changed} is missing or has changed", "the file as it was written", "resume from an older checkpoint"
                    )
                return Checkpoint(record, read(path / STATE, whole_numbers=True))
            except ImagicError as error:
                if rename_broken:
                    renamed = path.with_name(f"{path.name}.broken")
                    with writable(self.folder):
                        delete(renamed)
                        path.rename(renamed)
                    message = f"a broken checkpoint is skipped and renamed to {renamed}: {error.got}"
                    warnings.warn(message, ImagicWarning, stacklevel=2)
        return None

    def write_picture(self, name: str, content: bytes) -> Path:
        """Writes a picture for the user beside the checkpoints, and replaces the one of that name.

        Returns:
            The path of the picture.

        Raises:
            ImagicError: the disk is full, or the folder cannot be written to.
        """
        path, hidden = self.folder / name, self.folder / f".{name}"
        with writable(self.folder):
            hidden.write_bytes(content)
            hidden.replace(path)
        return path

    def any(self) -> bool:
        """Returns whether a checkpoint exists, intact or broken.

        Raises:
            ImagicError: the folder cannot be read, so that no checkpoint could be written to it.
        """
        try:
            return self.folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in self.folder.iterdir())
        except OSError as error:
            raise unreadable(self.folder, error) from error

    @property
    def size(self) -> int:
        """Size of all checkpoints in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def clear(self) -> None:
        """Removes all checkpoints."""
        remove(self.folder)

    def _folders(self) -> list[Path]:
        """Returns the folders of the checkpoints that are not marked as broken, oldest first."""
        return [path for stage in _STAGES for path in sorted(self.folder.glob(f"{stage}-*")) if path.is_dir() and path.suffix != ".broken"]
