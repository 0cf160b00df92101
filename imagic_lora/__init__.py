"""Edit one real photo with one sentence: Imagic (arXiv 2210.09276) on one consumer GPU.

The public library is what this file names; each name is imported when it is first used, so that ``import imagic_lora`` is quick::

    from imagic_lora import Editor, Store, configure, fit, open_base, result
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.store import Store
    from .core.config import RunConfig
    from .memory.plan import predict as plan
    from .sampling.editor import Editor
    from .training.configure import configure
    from .training.fit import fit, open_base, result

    __version__: str

__all__ = ["Editor", "RunConfig", "Store", "__version__", "configure", "fit", "open_base", "plan", "result"]

_PLACES = {
    "Editor": ("sampling.editor", "Editor"),
    "RunConfig": ("core.config", "RunConfig"),
    "Store": ("adapters.store", "Store"),
    "configure": ("training.configure", "configure"),
    "fit": ("training.fit", "fit"),
    "open_base": ("training.fit", "open_base"),
    "plan": ("memory.plan", "predict"),
    "result": ("training.fit", "result"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("imagic-lora")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    found = globals()[name] = getattr(import_module(f".{module}", __name__), attribute)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
