"""An editor that stays loaded from one edit to the next, in a process that runs one command after another. It imports no torch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.machine import counted_as_free

if TYPE_CHECKING:
    from .editor import Editor

Stamp = tuple[tuple[str, int, int], ...]


class KeptEditor:
    """The last editor that was opened inside :meth:`reused`.

    Its memory counts as free until the next command opens an editor: either it is used again, or released first. So the settings that
    depend on the free memory are the same as for a process without it.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._editor: Editor | None = None
        self._idle = True

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Lets the command inside the context use the editor again, or leave another one. After an exception none is kept."""
        self._idle = True
        with counted_as_free(self._held):
            _current.append(self)
            try:
                yield
            except BaseException:  # raised again: an editor after an error is not kept
                self.release()
                raise
            finally:
                _current.remove(self)

    def open(self, key: Any, load: Callable[[], Editor]) -> Editor:
        """Returns the editor if it was opened by this key, otherwise releases it and loads another one.

        Args:
            key: all that the editor depends on.
            load: loads one.
        """
        if self._editor is None or self._key != key:
            self.release()
            self._editor, self._key = load(), key
        self._idle = False
        return self._editor

    def release(self) -> None:
        """Frees the memory of the editor."""
        self._key = self._editor = None
        gc.collect()
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _held(self, device: str) -> int:
        """Bytes on a type of device that the editor gives back."""
        if self._editor is None or not self._idle or self._editor.base.runtime.device.type != device:
            return 0
        if device == "cuda":
            return sys.modules["torch"].cuda.memory_reserved(self._editor.base.runtime.device)
        return sum(tensor.nbytes for tensor in (*self._editor.base.denoiser.parameters(), *self._editor.base.denoiser.buffers()))


_current: list[KeptEditor] = []


def opened(key: Callable[[], Any], load: Callable[[], Editor]) -> Editor:
    """Returns the kept editor of this process, or a new one.

    Args:
        key: returns all that the editor depends on.
        load: loads one.
    """
    return _current[-1].open(key(), load) if _current else load()


def stamp(path: Path) -> Stamp:
    """Returns names, sizes and times of the files of a base: they change when the files do."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return tuple((str(one), (facts := one.stat()).st_size, facts.st_mtime_ns) for one in files)
