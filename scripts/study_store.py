"""What all studies share: the base, the scorer, the results of earlier runs, and means with their intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Score, Scorer
from imagic_lora.bench.summary import bootstrapped
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters.judge import Judge

MEMORY = MemoryConfig(device="cpu", dtype="fp32", optimizer="adam")
FACTORS = {"success": 100, "attributes": 100, "aligned": 100, "kept": 100, "background": 1, "psnr": 1}
"""What a measure is multiplied by: 100 for percent; levels of 255 and dB stay."""


class Study:
    """A base, the scorer, and a folder with the results of earlier runs: ``FINGERPRINT-SEED.jsonl``.

    Args:
        name: name or folder of the base.
        store: folder of the results.
    """

    def __init__(self, name: str, store: Path) -> None:
        self.name, self.store = name, store

    @cached_property
    def base(self) -> Base:
        """The base on the CPU, in fp32."""
        return load_base(self.name, resolve_runtime(MEMORY))

    @cached_property
    def scorer(self) -> Scorer:
        """The judge and CLIP of the package."""
        return Scorer(Judge.load(), CritterAlignment.load())

    def path(self, seed: int) -> Path:
        """The file with the results of a seed; its folder exists."""
        self.store.mkdir(parents=True, exist_ok=True)
        return self.store / f"{self.base.fingerprint[:12]}-{seed}.jsonl"

    def stored(self, seed: int, key: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """Returns the result with a key: a stored one, else that of ``measure``, which is appended to the file of the seed.

        Args:
            seed: seed of the cases.
            key: everything that the result depends on besides base and seed, as JSON values.
            measure: returns the result as JSON values.
        """
        path, text = self.path(seed), json.dumps(key)
        for row in map(json.loads, path.open()) if path.exists() else ():
            if row["key"] == text:
                return row["scores"]
        scores = measure()
        with path.open("a") as file:
            file.write(json.dumps({"key": text, "scores": scores}) + "\n")
        return scores


def values(scores: Sequence[Score], measure: str) -> list[float]:
    """The values of a measure of :data:`FACTORS`, times its factor."""
    return [FACTORS[measure] * float(getattr(score, measure)) for score in scores]


def interval(numbers: Sequence[float], sign: str = "") -> str:
    """A mean and its 95% interval over cases, with one decimal; ``sign`` is ``+`` for differences."""
    mean = bootstrapped(numbers)
    assert mean is not None
    return f"{mean.mean:{sign}.1f} [{mean.low:{sign}.1f}, {mean.high:{sign}.1f}]"


def paired(after: Sequence[float], before: Sequence[float]) -> str:
    """The :func:`interval` of the differences ``after - before``, case by case."""
    return interval([a - b for a, b in zip(after, before, strict=True)], "+")
