"""What a fit has come to so far, on the disk: whole or not there, checked before it is believed, never a pickle."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ..adapters.atomic import Manifest, atomic_folder, changed_file, read_manifest, remove, writable
from ..core.errors import ImagicError, ImagicWarning
from ..core.tensors import read, safetensors_pieces

CHECKPOINT, STATE = "checkpoint.json", "state.safetensors"
_ORDER = ("embed", "tune")


class CheckpointRecord(Manifest):
    """``checkpoint.json``, version 1.

    Args:
        step, steps: of the stage: done, and in all.
        inputs: all that the state depends on; a run that differs in any of it cannot go on from here.
        seconds: that each stage has taken so far.
        threads: of PyTorch on the CPU; the bits may depend on how many there are.
    """

    version: Literal[1] = 1
    stage: Literal["embed", "tune"]
    step: int = Field(ge=1)
    steps: int = Field(ge=1, le=100_000)
    inputs: dict[str, Any]
    seconds: dict[str, float]
    threads: int

    @model_validator(mode="after")
    def _no_further_than_the_last(self) -> CheckpointRecord:
        if self.step > self.steps:
            raise ValueError(f"step {self.step} of {self.steps}")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Args:
        tensors: the state of the stage, and whatever else its writer put in.
    """

    record: CheckpointRecord
    tensors: Mapping[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with ``prefix/``, without it."""
        return {name.removeprefix(f"{prefix}/"): value for name, value in self.tensors.items() if name.startswith(f"{prefix}/")}


class Checkpoints:
    """The checkpoints of one fit: the newest of each stage.

    Args:
        folder: of their own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, record: CheckpointRecord, tensors: Mapping[str, Tensor]) -> Path:
        """Writes a checkpoint; only when it is safely on the disk, the older one of its stage goes.

        Raises:
            ImagicError: a tensor is not finite, or the disk is full; the older one is still there.
        """
        with writable(self.folder):
            pass
        final = self.folder / f"{record.stage}-{record.step:06d}"
        with atomic_folder(final) as made:
            made.write(STATE, safetensors_pieces(tensors))
            made.write_manifest(CHECKPOINT, record)
        for path in self.folder.iterdir():
            if path != final and path.name.startswith((record.stage, ".")):  # those of a writer that was cut off begin with a dot
                shutil.rmtree(path, ignore_errors=True)
        return final

    def newest(self, main: bool = True) -> Checkpoint | None:
        """The newest checkpoint that is whole. One that is not is set aside, with a warning that names it.

        Args:
            main: False leaves a broken one where it is: another process sets it aside.
        """
        for path in reversed(self._there()):
            try:
                record = read_manifest(path, CHECKPOINT, CheckpointRecord)
                if broken := changed_file(path, record):
                    raise ImagicError(f"{broken} is missing or has changed", "the file as it was written", "go on from an older one")
                return Checkpoint(record, read(path / STATE, whole_numbers=True))
            except ImagicError as error:
                if main:
                    aside = path.with_name(f"{path.name}.broken")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                    message = f"a broken checkpoint is set aside as {aside}: {error.got}"
                    warnings.warn(message, ImagicWarning, stacklevel=2)
        return None

    def any(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir())

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def clear(self) -> None:
        """Removes them all."""
        remove(self.folder)

    def _there(self) -> list[Path]:
        """Their folders, oldest first."""
        return [path for stage in _ORDER for path in sorted(self.folder.glob(f"{stage}-*")) if path.is_dir() and path.suffix != ".broken"]


def differences(was: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> list[str]:
    """What is another in ``now`` than in ``was``, or is in only one of them, one phrase each."""
    found: list[str] = []
    for name in {**was, **now}:
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{group}{name}.")
        elif old != new or (name in was) != (name in now):
            told = [repr(side[name]) if name in side else "missing" for side in (was, now)]
            found.append(f"{group}{name} was {told[0]}, is {told[1]}")
    return found
