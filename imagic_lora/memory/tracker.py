"""Counts the bytes of all tensors while code runs, on any device and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tracker(TorchDispatchMode):
    """Counts every tensor storage that an operation returns while the mode is active, and subtracts it when it is freed.

    A storage counts with the size at its first appearance. Not counted: workspace inside a kernel, rounding by the allocator, memory of the
    driver. Entered after ``FakeTensorMode``, the mode counts tensors without values.

    Attributes:
        now: bytes held.
        peak: the most bytes held since the start or the last :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that existed before the mode was active."""
        for tensor in tensors:
            self._add(tensor)

    def reset_peak(self) -> None:
        """Sets the peak to the bytes that are held now."""
        self.peak = self.now

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result
