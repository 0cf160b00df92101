"""The processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState


class Processes:
    """The processes of this run: one, or those that ``accelerate launch`` started."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._several = state is not None and state.num_processes > 1
        self.count = state.num_processes if state is not None else 1
        self.rank = state.process_index if state is not None else 0
        self._state = state

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def samples(self, batch: int) -> range:
        """The global indices of this process's samples, where each process has ``batch``."""
        return range(self.rank * batch, (self.rank + 1) * batch)

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes; must be called by all of them."""
        if self._several:
            for tensor in tensors:
                tensor.copy_(_reduced(tensor, "mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of the processes; must be called by all of them."""
        if not self._several or self._state is None:
            return flag
        return bool(_reduced(torch.tensor(float(flag), device=self._state.device), "sum") > 0)


def _reduced(tensor: Tensor, how: str) -> Tensor:
    from accelerate.utils import reduce  # slow to import, and needed with several processes only

    return reduce(tensor, how)  # pyright: ignore[reportReturnType]  # a tensor in, a tensor out
