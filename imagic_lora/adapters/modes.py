"""What every mode trains in the denoiser: its files, and how they are trained and saved. One table for all modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch.nn import Parameter

from ..bases.base import Base
from ..core.config import Mode, TuneConfig
from .atomic import AtomicWriter
from .full import full_files, save_full, unfrozen
from .lora import attached, lora_files, save_lora

Trainables = AbstractContextManager[dict[str, Parameter]]


@dataclass(frozen=True)
class ModeWeights:
    """The weights that a mode trains.

    Args:
        in_base: whether they are the base's own weights. Their base is opened with master weights, and cannot be quantized.
        trainables: returns a context that makes the weights trainable and yields the parameters by name. Afterwards the base is bit-equal
            to before. Arguments: the base, the settings of stage 2, the seed of new weights, and False to keep trained weights of the base.
        files: returns the names of the files that ``save`` writes.
        save: writes the weights into the folder of an adapter, inside the context of ``trainables``.
    """

    in_base: bool
    trainables: Callable[[Base, TuneConfig, int, bool], Trainables]
    files: Callable[[Base], tuple[str, ...]]
    save: Callable[[Base, AtomicWriter], None]


def _attached(base: Base, config: TuneConfig, seed: int, restore: bool) -> Trainables:
    return attached(base, config, seed)


def _unfrozen(base: Base, config: TuneConfig, seed: int, restore: bool) -> Trainables:
    return unfrozen(base, restore)


MODES: dict[Mode, ModeWeights] = {
    "lora": ModeWeights(False, _attached, lora_files, save_lora),
    "full": ModeWeights(True, _unfrozen, full_files, save_full),
    "embedding": ModeWeights(False, lambda *_: nullcontext({}), lambda _: (), lambda *_: None),
}
