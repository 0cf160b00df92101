"""One base in memory, many adapters swapped in and out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from threading import Lock

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas, read_embeddings, read_layers
from ..adapters.full import Weights, loaded_full
from ..adapters.lora import LoraLayers, loaded_lora, swap_lora
from ..bases.base import Base
from ..core.conditioning import Conditioning, interpolate, source_conditionings
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .checks import check_edit, check_scheduler_steps
from .generate import generate

CACHED = 8  # adapters that are kept in memory; full weights are not


@dataclass(frozen=True)
class Edit:
    """A picture and what made it."""

    eta: float
    seed: int
    image: Image.Image


@dataclass(frozen=True)
class _CachedAdapter:
    """What of an adapter is kept in memory; ``layers`` is None where it has full weights."""

    adapter: Adapter
    layers: LoraLayers | None
    canvas: Canvas
    embeddings: dict[str, Conditioning]


class Editor:
    """Keeps a base loaded and edits with any adapter that belongs to it.

    The last adapter stays in; another takes its place when it is needed. Those used last are kept in memory, each as its record tells of
    it. Threads may share an editor, and edits may be interleaved: every batch of pictures is made with its own adapter in, and no other at
    work. :meth:`close` gives the base back bit-equal to before; until then nothing else may change it.

    Args:
        force: adapters of other bases of the same shapes are used, too.
    """

    def __init__(self, base: Base, force: bool = False) -> None:
        self.base, self.force = base, force
        self._lock = Lock()
        self._cached: dict[tuple[Path, str], _CachedAdapter] = {}  # the one used last comes last
        self._stack = ExitStack()
        self._loaded: _CachedAdapter | None = None
        self._base_weights: Weights | None = None

    def load(self, adapter: Adapter) -> None:
        """Puts an adapter's weights into the base.

        Raises:
            ImagicError: as :meth:`~imagic_lora.adapters.adapter.Adapter.worn_by`, or another adapter has taken its place on the disk. The
                adapter before is still in where a record, a header or LoRA layers told.
        """
        with self._lock:
            self._load(self._read(adapter))

    def edit(
        self, adapter: Adapter, etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str | None = None
    ) -> Iterator[Edit]:
        """Pictures for every eta and seed, in that order, as batches are done.

        Args:
            etas: each in [0, 2]; 0 is the photo, 1 the target text.
            seeds: of the starting noise.
            prompt: another target text than the adapter's own.

        Raises:
            ImagicError: an eta out of range, as :meth:`load`, a picture holds NaN.
        """
        check_edit(etas, seeds, config, adapter.record.prompt if prompt is None else prompt)
        pairs = list(product(etas, seeds))
        with self._lock:
            cached = self._read(adapter)
            check_scheduler_steps(self.base, config)
            device = self.base.runtime.device
            stored = {name: value.to(device) for name, value in cached.embeddings.items()}
            target = stored["target"] if prompt is None else replace(self.base.encode_prompt(prompt), extra=stored["target"].extra)
            self.base.offload_encoders()
        mixes = [interpolate(target, stored["optimised"], eta) for eta, _ in pairs]
        of_photo = source_conditionings(target, stored["optimised"], [eta for eta, _ in pairs], config.source_eta)
        pictures = generate(self.base, mixes, [seed for _, seed in pairs], config, cached.canvas, stored.get("null"), of_photo)
        for start in range(0, len(pairs), config.batch_size):
            batch = pairs[start : start + config.batch_size]
            with self._lock:  # never while it yields: the caller may go on with another edit, or never come back
                self._load(cached)
                made = list(islice(pictures, len(batch)))
            yield from (Edit(eta, seed, picture) for (eta, seed), picture in zip(batch, made, strict=True))

    def close(self) -> None:
        """Takes the adapter out: the base is bit-equal to before."""
        with self._lock:
            self._loaded = self._base_weights = None
            self._stack.close()

    def _read(self, adapter: Adapter) -> _CachedAdapter:
        """What is kept of an adapter, read if it is not there."""
        key = adapter.folder, adapter.record.model_dump_json()  # which has the hash of every file
        cached = self._cached.pop(key, None)
        if cached is None:
            cached = _CachedAdapter(adapter, read_layers(adapter, self.base, self.force), read_canvas(adapter), read_embeddings(adapter))
            adapter.check_unchanged()
        self._cached[key] = cached
        if len(self._cached) > CACHED:
            del self._cached[next(iter(self._cached))]
        return cached

    def _load(self, cached: _CachedAdapter) -> None:
        """The same adapter is left in; LoRA layers take the place of those with equal targets; else what is in goes first."""
        if cached is self._loaded:
            return
        self._loaded = None
        try:
            if cached.layers is None or not swap_lora(self.base, cached.layers):
                self._stack.close()
                self._apply(cached)
        except BaseException:
            self._stack.close()
            raise
        self._loaded = cached

    def _apply(self, cached: _CachedAdapter) -> None:
        if cached.layers is not None:
            self._stack.enter_context(loaded_lora(self.base, cached.layers))
        else:
            self._base_weights = self._stack.enter_context(loaded_full(self.base, cached.adapter.folder, self._base_weights))
            cached.adapter.check_unchanged()
