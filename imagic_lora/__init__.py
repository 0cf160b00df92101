"""Edit one real photo with one target prompt: Imagic (arXiv 2210.09276) on one consumer GPU.

``__all__`` lists the public library (docs/reference/api.md). Each name is imported when it is first used, so that ``import imagic_lora`` is
fast::

    from imagic_lora import Editor, Store, configure, fit, open_base, result
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.store import Store
    from .bases.loading.registry import architecture_of
    from .core.config import RunConfig
    from .core.errors import ImagicError
    from .memory.prediction import predict as plan
    from .sampling.edit_pipeline import EditPipeline
    from .sampling.editor import Edit, Editor
    from .training.configure import configure
    from .training.fit import fit, open_base, result
    from .training.grouping import Item
    from .training.together import fit_together

    __version__: str

__all__ = [
    "Adapter",
    "Edit",
    "EditPipeline",
    "Editor",
    "ImagicError",
    "Item",
    "RunConfig",
    "Store",
    "__version__",
    "architecture_of",
    "configure",
    "fit",
    "fit_together",
    "open_base",
    "plan",
    "result",
]

_SOURCES = {  # module and attribute of each public name
    "Adapter": ("adapters.adapter", "Adapter"),
    "Edit": ("sampling.editor", "Edit"),
    "EditPipeline": ("sampling.edit_pipeline", "EditPipeline"),
    "Editor": ("sampling.editor", "Editor"),
    "ImagicError": ("core.errors", "ImagicError"),
    "Item": ("training.grouping", "Item"),
    "RunConfig": ("core.config", "RunConfig"),
    "Store": ("adapters.store", "Store"),
    "architecture_of": ("bases.loading.registry", "architecture_of"),
    "configure": ("training.configure", "configure"),
    "fit": ("training.fit", "fit"),
    "fit_together": ("training.together", "fit_together"),
    "open_base": ("training.fit", "open_base"),
    "plan": ("memory.prediction", "predict"),
    "result": ("training.fit", "result"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("imagic-lora")
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    value = globals()[name] = getattr(import_module(f".{module}", __name__), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
