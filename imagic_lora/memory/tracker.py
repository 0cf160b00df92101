"""Memory counted tensor by tensor, on any device and for fake tensors too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tracker(TorchDispatchMode):
    """Counts the bytes of every tensor storage that an operation returns while it is active, and takes them off when the storage goes.

    A storage counts with the size that it had when it was first seen. What a kernel needs inside itself, the allocator's rounding and the
    driver are not in it. Under ``FakeTensorMode``, entered before it, it counts a run that never happens.

    Attributes:
        now: bytes held.
        peak: the most bytes held since the start or :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Starts the peak anew from what is held."""
        self.peak = self.now

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self._sizes:
            self._sizes[place] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self._sizes.pop(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result
