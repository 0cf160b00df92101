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
from ..adapters.lora import Layers, loaded_lora, swapped_lora
from ..bases.base import Base
from ..core.conditioning import Conditioning, interpolate, sources
from ..core.config import EditConfig
from ..photos.canvas import Canvas
from .checks import refuse_edit, refuse_steps
from .generate import generate

HELD = 8  # adapters that are kept in memory; full weights are not


@dataclass(frozen=True)
class Edit:
    """A picture and what made it."""

    eta: float
    seed: int
    image: Image.Image


@dataclass(frozen=True)
class _Held:
    """What of an adapter is kept in memory; ``layers`` is None where it has full weights."""

    adapter: Adapter
    layers: Layers | None
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
        self._held: dict[tuple[Path, str], _Held] = {}  # the one used last comes last
        self._stack = ExitStack()
        self._worn: _Held | None = None
        self._own: Weights | None = None

    def wear(self, adapter: Adapter) -> None:
        """Puts an adapter's weights into the base.

        Raises:
            ImagicError: as :meth:`~imagic_lora.adapters.adapter.Adapter.worn_by`, or another adapter has taken its place on the disk. The
                adapter before is still in where a record, a header or LoRA layers told.
        """
        with self._lock:
            self._put_on(self._hold(adapter))

    def edit(
        self, adapter: Adapter, etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str | None = None
    ) -> Iterator[Edit]:
        """Pictures for every eta and seed, in that order, as batches are done.

        Args:
            etas: each in [0, 2]; 0 is the photo, 1 the target text.
            seeds: of the starting noise.
            prompt: another target text than the adapter's own.

        Raises:
            ImagicError: an eta out of range, as :meth:`wear`, a picture holds NaN.
        """
        refuse_edit(etas, seeds, config, adapter.record.prompt if prompt is None else prompt)
        pairs = list(product(etas, seeds))
        with self._lock:
            held = self._hold(adapter)
            refuse_steps(self.base, config)
            device = self.base.runtime.device
            stored = {name: value.to(device) for name, value in held.embeddings.items()}
            target = stored["target"] if prompt is None else replace(self.base.encode_text(prompt), extra=stored["target"].extra)
            self.base.rest()
        mixes = [interpolate(target, stored["optimised"], eta) for eta, _ in pairs]
        of_photo = sources(target, stored["optimised"], [eta for eta, _ in pairs], config.source_eta)
        pictures = generate(self.base, mixes, [seed for _, seed in pairs], config, held.canvas, stored.get("null"), of_photo)
        for start in range(0, len(pairs), config.batch_size):
            batch = pairs[start : start + config.batch_size]
            with self._lock:  # never while it yields: the caller may go on with another edit, or never come back
                self._put_on(held)
                made = list(islice(pictures, len(batch)))
            yield from (Edit(eta, seed, picture) for (eta, seed), picture in zip(batch, made, strict=True))

    def close(self) -> None:
        """Takes the adapter out: the base is bit-equal to before."""
        with self._lock:
            self._worn = self._own = None
            self._stack.close()

    def _hold(self, adapter: Adapter) -> _Held:
        """What is kept of an adapter, read if it is not there."""
        key = adapter.folder, adapter.record.model_dump_json()  # which has the hash of every file
        held = self._held.pop(key, None)
        if held is None:
            held = _Held(adapter, read_layers(adapter, self.base, self.force), read_canvas(adapter), read_embeddings(adapter))
            adapter.refuse_replaced()
        self._held[key] = held
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return held

    def _put_on(self, held: _Held) -> None:
        """The same adapter is left in; LoRA layers take the place of those with equal targets; else what is in goes first."""
        if held is self._worn:
            return
        self._worn = None
        try:
            if held.layers is None or not swapped_lora(self.base, held.layers):
                self._stack.close()
                self._enter(held)
        except BaseException:
            self._stack.close()
            raise
        self._worn = held

    def _enter(self, held: _Held) -> None:
        if held.layers is not None:
            self._stack.enter_context(loaded_lora(self.base, held.layers))
        else:
            self._own = self._stack.enter_context(loaded_full(self.base, held.adapter.folder, self._own))
            held.adapter.refuse_replaced()
