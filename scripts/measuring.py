"""What the scripts that measure memory and speed share: settings of a run, bases with random weights, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.training.fit import open_base
from imagic_lora.training.rehearsing.random_base import random_base


def settings(base: str, mode: Mode, preset: str, *changes: dict[str, Any]) -> RunConfig:
    """The configuration of a run: the recipe of the base, a preset, and changes to them."""
    built = architecture(base)
    return resolve(
        merged({"base": base, "preset": preset, "tune": {"mode": mode}}, *changes),
        {},
        recipe_of(base, kind=built.recipe),
        large=built.has_large_encoder,
    )


def opened(run: RunConfig) -> Any:
    """The embedded base, or another base at true size with random weights."""
    if run.base == "critters":
        return open_base(run)
    return random_base(architecture(run.base), run, resolve_runtime(run.memory))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, each printed as soon as its row is there; numbers with a fraction have three digits."""
    lines = []
    for cells in chain((columns, ["---"] * len(columns)), rows):
        lines.append(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
        print(lines[-1], flush=True)
    return lines
