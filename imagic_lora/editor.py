"""One base in memory, many adapters swapped in and out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

from PIL import Image

from .adapter import Adapter
from .bases.base import Base
from .conditioning import interpolate
from .config import EditConfig
from .errors import ImagicError
from .generate import generate, refuse_empty, refuse_no_steps


@dataclass(frozen=True)
class Edit:
    """A picture and what made it."""

    eta: float
    seed: int
    image: Image.Image


def refuse_edit(etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str) -> None:
    """Raises ImagicError for an eta outside [0, 2], an empty prompt, settings that leave the sampler no step, or seeds without a use."""
    for eta in etas:
        if not 0 <= eta <= 2:
            raise ImagicError(f"eta {eta:g}", "0 (the photo) to 1 (the text), at most 2", "choose another --eta")
    if len(seeds) > 1 and config.start == "inverted" and not config.ddim_eta:
        got = f"{len(seeds)} seeds with start inverted"
        raise ImagicError(got, "one: the noise is the photo's own", "use --start noise for several, or add --ddim-eta")
    refuse_empty(prompt)
    refuse_no_steps(config)


class Editor:
    """Keeps a base loaded and edits with any adapter that belongs to it.

    The last adapter stays in; another takes its place when it is needed. :meth:`close` gives the base back bit-equal to before.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._stack = ExitStack()
        self._worn: Adapter | None = None

    def wear(self, adapter: Adapter) -> None:
        """Puts an adapter's weights into the base.

        Raises:
            ImagicError: as :meth:`~imagic_lora.adapter.Adapter.worn_by`; the adapter before is still in where a record or a header told.
        """
        if self._worn is adapter:
            return
        adapter.refuse_foreign(self.base)
        self.close()
        self._stack.enter_context(adapter.worn_by(self.base))
        self._worn = adapter

    def edit(
        self, adapter: Adapter, etas: Sequence[float], seeds: Sequence[int], config: EditConfig, prompt: str | None = None
    ) -> Iterator[Edit]:
        """Pictures for every eta and seed, in that order, as batches are done.

        Args:
            etas: each in [0, 2]; 0 is the photo, 1 the target text.
            seeds: of the starting noise.
            prompt: another target text than the adapter's own.

        Raises:
            ImagicError: an eta out of range, an adapter of another base, numbers that are not finite.
        """
        refuse_edit(etas, seeds, config, adapter.record.prompt if prompt is None else prompt)
        self.wear(adapter)
        device = self.base.runtime.device
        stored = {name: value.to(device) for name, value in adapter.embeddings().items()}
        target = stored["target"] if prompt is None else self.base.encode_text(prompt)
        self.base.rest()
        canvas, pairs = adapter.canvas(), list(product(etas, seeds))
        mixes = [interpolate(target, stored["optimised"], eta) for eta, _ in pairs]
        pictures = generate(self.base, mixes, [seed for _, seed in pairs], config, canvas, stored.get("null"), stored["optimised"])
        yield from (Edit(eta, seed, picture) for (eta, seed), picture in zip(pairs, pictures, strict=True))

    def close(self) -> None:
        """Takes the adapter out: the base is bit-equal to before."""
        self._stack.close()
        self._worn = None
