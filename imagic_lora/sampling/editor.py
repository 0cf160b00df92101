"""Edits with many adapters on one loaded base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from threading import Lock

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import StoredWeights, read_canvas, read_embeddings, read_weights
from ..adapters.full import FullWeights, Weights, loaded_full
from ..adapters.lora import LoraLayers, loaded_lora, swap_lora
from ..adapters.withheld import check_start
from ..adapters.word import NewWord, read_word
from ..bases.altered import altered, check_unaltered, restore
from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..core.errors import ImagicError, ImagicWarning
from ..photos.canvas import Canvas
from .checks import check_edit, check_scheduler
from .edit_pipeline import EditPipeline, Lease, check_carried_over, edit_pipeline
from .generate import generate
from .mixing import mixtures
from .pipelines import negative

CACHED = 8  # maximum number of cached adapters; full weights stay on disk


@dataclass(frozen=True)
class Edit:
    """An edited image and the eta and seed that produced it.

    Args:
        eta, seed: of the edit.
        image: RGB, at the size of the photo, or of its region.
        batch: eta and seed of every image of its batch, in order: on some devices the last bits of an image depend on them.
        mask: where it was pasted into the photo (``imagic_lora.sampling.keep``): mode L, of the image's size. None: it was not.
        reference_batch: the batch of the image at eta 0 that it was compared with for its mask.
    """

    eta: float
    seed: int
    image: Image.Image
    batch: tuple[tuple[float, int], ...] = ()
    mask: Image.Image | None = None
    reference_batch: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class _CachedAdapter:
    """The cached content of an adapter.

    Args:
        weights: LoRA layers in host memory, full weights on disk, or None for an adapter without weights.
        canvas: the photo that the adapter was trained on.
        embeddings: ``target``, ``optimised`` and, if the base has one, ``null``.
        word: the new word of textual inversion, or None.
    """

    adapter: Adapter
    weights: StoredWeights
    canvas: Canvas
    embeddings: dict[str, Conditioning]
    word: NewWord | None = None


class Editor:
    """Keeps a base loaded and edits with any adapter that was trained on it.

    The last adapter stays loaded until another one is needed. The eight most recently used adapters are cached in memory,
    identified by folder and record. Threads can share an editor, and edits can be interleaved: a lock ensures that every batch of images
    is generated with its own adapter loaded. :meth:`close` restores the base bit for bit; until then nothing else can change it. After an
    exception at any point the next call restores the base before it does anything else.

    Args:
        base: the loaded base.
        force: also accepts adapters of other bases with the same shapes.
    """

    def __init__(self, base: Base, force: bool = False) -> None:
        self.base, self.force = base, force
        self._lock = Lock()
        self._cached: dict[tuple[Path, str], _CachedAdapter] = {}  # ordered by last use, most recent last
        self._stack = ExitStack()
        self._loaded: _CachedAdapter | None = None
        self._base_weights: Weights | None = None
        self._leases: set[Lease] = set()  # of the pipelines that are in use; all have the loaded adapter

    def load(self, adapter: Adapter) -> None:
        """Loads an adapter into the base.

        Raises:
            ImagicError: the adapter does not fit the base, or its folder was replaced since it was read. The previous adapter stays loaded.
                If loading full weights fails, no adapter is loaded. The base is in use by a fit or by another Editor.
        """
        with self._lock:
            self._load(self._read(adapter))

    def conditionings(self, adapter: Adapter, prompt: str | None = None) -> dict[str, Conditioning]:
        """Returns the conditionings of an adapter on the device: ``target``, ``optimised`` and, if the base has one, ``null``.

        Args:
            adapter: the adapter.
            prompt: a target prompt that replaces the one of the adapter.
        """
        with self._lock:
            return self._conditionings(self._read(adapter), prompt)

    def edit(
        self,
        adapter: Adapter,
        etas: Sequence[float],
        seeds: Sequence[int],
        config: EditConfig,
        prompt: str | None = None,
        tuned: bool = True,
    ) -> Iterator[Edit]:
        """Generates an edit for every eta and, for each eta, every seed: ``e_eta = eta * e_tgt + (1 - eta) * e_opt``.

        Args:
            adapter: the adapter to edit with.
            etas: interpolation weights, each in [0, 2]; 0 gives the reconstruction of the photo, 1 the target prompt alone.
            seeds: seeds of the starting noise.
            config: settings of the sampling.
            prompt: a target prompt that replaces the one of the adapter.
            tuned: False samples from the base without the adapter's weights, with its embeddings alone: the model before stage 2.

        Yields:
            The edits in order, after each batch.

        Raises:
            ImagicError: an eta or a seed is out of range, or an eta is not 1 and the method of the adapter has none; settings exclude each
                other, or the base cannot be sampled with them; the photo is withheld and needed; a
                :meth:`pipeline` of another adapter is in use; an image holds NaN; as
                :meth:`load`.
        """
        yield from self.edit_pairs(adapter, list(product(etas, seeds)), config, prompt, tuned)

    def edit_pairs(
        self, adapter: Adapter, pairs: Sequence[tuple[float, int]], config: EditConfig, prompt: str | None = None, tuned: bool = True
    ) -> Iterator[Edit]:
        """Generates an edit for every pair of eta and seed, in batches of ``config.batch_size``; otherwise as :meth:`edit`.

        Args:
            pairs: eta and seed of each edit.
            adapter, config, prompt, tuned: as there.
        """
        self._check(adapter, pairs, config, prompt)
        with self._lock:
            cached = self._read(adapter)
            conditionings, sources, null = self._mixtures(cached, [eta for eta, _ in pairs], config, prompt)
            loaded = cached if tuned else replace(cached, weights=None)
        images = generate(self.base, conditionings, [seed for _, seed in pairs], config, cached.canvas, null, sources)
        for start in range(0, len(pairs), config.batch_size):
            batch = pairs[start : start + config.batch_size]
            with self._lock:  # not held across a yield: a caller may switch between running edits
                self._load(loaded)
                batch_images = list(islice(images, len(batch)))
            yield from (Edit(eta, seed, image, tuple(batch)) for (eta, seed), image in zip(batch, batch_images, strict=True))

    @contextmanager
    def pipeline(self, adapter: Adapter, eta: float, config: EditConfig | None = None, prompt: str | None = None) -> Iterator[EditPipeline]:
        """A pipeline of diffusers with the adapter applied, which shares the weights of the base, and the kwargs of the edit at an eta.

        It is valid inside of the ``with`` block. There the adapter stays loaded: whatever would load another one or :meth:`close` the
        editor raises an error; edits and further pipelines of the same adapter are allowed. After the block the denoiser of the pipeline,
        and of every pipeline made from its components, raises an error, and the base is as after an :meth:`edit`. Changes of the pipeline
        do not reach the base: its modules are of their own, on the same weights (:mod:`imagic_lora.sampling.edit_pipeline`).

        Args:
            adapter, eta, prompt: as for :meth:`edit`. Vectors of tokens (``embed.space`` input) are interpolated and encoded as there.
            config: settings of the sampling, by default those of the adapter; the start is noise. ``batch_size`` has no effect.

        Raises:
            ImagicError: as :meth:`edit`; the start is not noise, or the photo is a reference image; the base has no text-to-image pipeline;
                the pipeline or its scheduler cannot take ``guidance_rescale`` or ``ddim_eta``.
        """
        config, lease = config or adapter.record.config.edit, Lease(adapter.name)
        check_carried_over(config)
        self._check(adapter, [(eta, 0)], config, prompt)
        with self._lock:
            cached = self._read(adapter)
            (conditioning,), _, null = self._mixtures(cached, [eta], config, prompt)
            self._load(cached)
            made = edit_pipeline(self.base, config, conditioning, null, cached.canvas, lease)
            if cached.weights is None and not self._leases:
                self._stack.enter_context(altered(self.base, lambda: None))  # for a fit on the same base, as other adapters are
            self._leases.add(lease)
        try:
            yield made
        finally:
            lease.open = False
            self._leases.discard(lease)  # not under the lock: a block that was abandoned is left by the garbage collector, at any time

    def close(self) -> None:
        """Unloads the adapter; the base is then bit-equal to before. If an exception interrupts it, another call completes it.

        Raises:
            ImagicError: a :meth:`pipeline` is in use.
        """
        with self._lock:
            self._check_leases("close the Editor")
            self._unload()
            self._base_weights = None

    def _check(self, adapter: Adapter, pairs: Sequence[tuple[float, int]], config: EditConfig, prompt: str | None) -> None:
        """Checks etas, seeds, settings and prompt before anything is read."""
        etas, seeds = sorted({eta for eta, _ in pairs}), sorted({seed for _, seed in pairs})
        adapter.record.check_etas(etas)
        check_start(adapter, config)
        check_edit(etas, seeds, config, adapter.record.prompt if prompt is None else prompt)

    def _mixtures(
        self, cached: _CachedAdapter, etas: list[float], config: EditConfig, prompt: str | None
    ) -> tuple[list[Conditioning], list[Conditioning], Conditioning | None]:
        """The conditionings of edits and of the photo, as :func:`mixtures`, and what guidance leads away from."""
        check_scheduler(self.base, config)
        stored = self._conditionings(cached, prompt)
        null = negative(self.base, config, stored.get("null"))
        asked = cached.adapter.record.prompt if prompt is None else prompt
        conditionings, sources = mixtures(self.base, asked, stored["target"], stored["optimised"], etas, config)
        self.base.offload_encoders()
        return conditionings, sources, null

    def _check_leases(self, doing: str) -> None:
        """Raises ImagicError if a pipeline is in use."""
        if names := sorted(lease.adapter for lease in self._leases):
            got = f"a request to {doing} while a pipeline of adapter {names[0]} is in use"
            expected = "that adapter until the with block of Editor.pipeline ends"
            raise ImagicError(got, expected, "leave the block first, or open the base a second time")

    def _conditionings(self, cached: _CachedAdapter, prompt: str | None) -> dict[str, Conditioning]:
        """As :meth:`conditionings`."""
        stored = {name: value.to(self.base.runtime.device) for name, value in cached.embeddings.items()}
        if prompt is not None:
            encoded = self._encoded(cached, prompt)
            stored["target"] = replace(encoded, extra=stored["target"].extra)
        return stored

    def _encoded(self, cached: _CachedAdapter, prompt: str) -> Conditioning:
        """Encodes another prompt for an adapter; warns if a new word that the adapter is for does not occur in it."""
        if cached.word is None:
            return self.base.encode_vectors(prompt) if cached.embeddings["target"].vectors else self.base.encode_prompt(prompt)
        if not cached.word.occurs(prompt):
            message = f"the prompt {prompt!r} does not contain {cached.word.text}, the new word of adapter {cached.adapter.name}"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        return cached.word.encode(self.base, prompt)

    def _read(self, adapter: Adapter) -> _CachedAdapter:
        """Returns the cached content of an adapter, and reads it from disk if it is not cached."""
        key = adapter.folder, f"{adapter.photo} {adapter.record.model_dump_json()}"  # the record holds the hash of every file
        cached = self._cached.pop(key, None)
        if cached is None:
            weights = read_weights(adapter, self.base, self.force)
            word = read_word(adapter, self.base)
            cached = _CachedAdapter(adapter, weights, read_canvas(adapter), read_embeddings(adapter), word)
            adapter.check_unchanged()
        self._cached[key] = cached
        if len(self._cached) > CACHED:
            del self._cached[next(iter(self._cached))]
        return cached

    def _load(self, cached: _CachedAdapter) -> None:
        """Loads a cached adapter: swaps LoRA layers with equal targets in place, otherwise unloads the previous adapter first."""
        if cached is self._loaded and (cached.weights is not None or self._leases):
            return
        self._check_leases(f"load adapter {cached.adapter.name}")
        previous, self._loaded = self._loaded, None
        try:
            if not (previous and isinstance(cached.weights, LoraLayers) and swap_lora(self.base, cached.weights)):
                self._unload()
                self._apply(cached)
        except BaseException:  # Ctrl-C too: half an adapter does not stay loaded
            self._unload()
            raise
        self._loaded = cached

    def _unload(self) -> None:
        """Unloads the adapter, and completes an earlier unloading that an exception has interrupted."""
        self._loaded = None
        self._stack.close()
        restore(self.base)

    def _apply(self, cached: _CachedAdapter) -> None:
        """Applies the weights of an adapter, if it has any, to a base without an adapter."""
        match cached.weights:
            case LoraLayers() as layers:
                self._stack.enter_context(loaded_lora(self.base, layers))
            case FullWeights(folder):
                self._base_weights = self._stack.enter_context(loaded_full(self.base, folder, self._base_weights))
                cached.adapter.check_unchanged()
            case None:
                check_unaltered(self.base)
