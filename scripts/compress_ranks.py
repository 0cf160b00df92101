"""Quality of compressed full adapters on the embedded base: ``python scripts/compress_ranks.py``; takes some minutes.

Fits full adapters on cases of CritterBench and compresses each to several ranks. For every rank it prints the lost share of the weight
change (a relative norm), the size, the distance of the edit from that of the full adapter, and how many edits the judge counts as done and
as successes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers.utils import logging
from PIL import Image

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Score, Scorer
from imagic_lora.core.config import RunConfig
from imagic_lora.critters import render
from imagic_lora.critters.judge import Judge
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, open_base, result

RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Row:
    """Measurements of one adapter of one case.

    Args:
        rank: None for the full adapter.
        error: lost part of the weight change, as a relative norm in [0, 1].
        size: in bytes.
        pixels: mean absolute difference to the full adapter's edit, in levels of 0 to 255.
        score: CritterBench's score of the edit.
    """

    rank: int | None
    error: float
    size: int
    pixels: float
    score: Score


def measured(editor: Editor, scorer: Scorer, case: Case, config: RunConfig, folder: Path) -> Iterator[Row]:
    """Fits a full adapter to a case and yields its row, then a row for each rank it is compressed to."""
    config = config.model_copy(update={"seed": case.index})
    store, photo = Store(folder / str(case.index)), folder / f"{case.index}.png"
    render(case.source).save(photo)
    editor.close()
    full = result(fit(photo, case.prompt, config, store, "full", base=editor.base))
    assert full is not None

    def edited(adapter: Adapter) -> Image.Image:
        (edit,) = editor.edit(adapter, [config.eta], [case.index], config.edit)
        return edit.image

    reference = edited(full)
    yield Row(None, 0.0, full.size, 0.0, scorer.score(case, reference))
    for rank in RANKS:
        editor.close()
        small = compress(full, editor.base, rank, store, f"rank-{rank}")
        image = edited(small)
        assert small.record.compressed is not None
        difference = float(np.abs(np.asarray(image, dtype=float) - np.asarray(reference, dtype=float)).mean())
        yield Row(rank, small.record.compressed.error, small.size, difference, scorer.score(case, image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7, help="seed of the cases")
    args = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    config = defaults("full", {"memory": {"device": "cpu", "dtype": "fp32"}})
    editor, scorer = Editor(open_base(config)), Scorer(Judge.load(), CritterAlignment.load())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.cases):
            rows += measured(editor, scorer, case_at(args.seed, index), config, Path(folder))
    print("| rank | norm lost | MB | pixels apart | attributes | success |\n|---|---|---|---|---|---|")
    for rank in (*RANKS, None):
        selected = [row for row in rows if row.rank == rank]
        error, size, pixels = (np.mean([getattr(row, name) for row in selected]) for name in ("error", "size", "pixels"))
        done, right = (sum(getattr(row.score, name) for row in selected) for name in ("attributes", "success"))
        print(
            f"| {rank or 'full'} | {error:.1%} | {size / 1e6:.2f} | {pixels:.2f} | {done} of {len(selected)} | {right} of {len(selected)} |"
        )


if __name__ == "__main__":
    main()
