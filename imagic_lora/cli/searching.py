"""The search of ``edit --eta auto``, with its progress and its cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..core.text import exact
from .console import err, progress

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..core.config import EditConfig
    from ..sampling.editor import Editor
    from ..sampling.sweeps.sweep import Scores


def searched_eta(editor: Editor, adapter: Adapter, seed: int, config: EditConfig, prompt: str | None) -> dict[str, Any]:
    """Searches for an eta, and prints it with what the search has cost.

    Args:
        editor: with the base of the adapter.
        adapter: the adapter to edit with.
        seed: seed of the images of the search.
        config: settings of the sampling.
        prompt: a target prompt that replaces the one of the adapter.

    Returns:
        ``eta``, ``rule``, ``images``, ``passes`` (of one sample through the denoiser) and ``seconds``.
    """
    from ..methods.method import metered
    from ..sampling.sweeps.suggest import RULE, SEARCHED
    from ..sampling.sweeps.sweep import find_eta

    found: list[float] = []

    def steps() -> Iterator[Scores]:
        found.append((yield from find_eta(editor, adapter, seed, config, prompt)))

    with metered(editor.base) as meter:
        images = sum(1 for _ in progress(steps(), SEARCHED, "searching for eta"))
        cost = meter.cost()
    eta, seconds = found[0], round(cost.seconds, 1)
    err.print(f"Eta {exact(eta)} (auto, rule {RULE}): {images} images, {cost.forward} denoiser passes, {seconds} s", highlight=False)
    return {"eta": eta, "rule": RULE, "images": images, "passes": cost.forward, "seconds": seconds}
