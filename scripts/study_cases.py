"""Studies that fit and edit one case after the other, as the command line does it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from study_store import FACTORS, Study, paired

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.store import Store
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import STARTS, defaults, kind_of
from imagic_lora.cli.console import progress
from imagic_lora.core.config import RunConfig
from imagic_lora.critters import render
from imagic_lora.photos.png import write_png
from imagic_lora.photos.sheet import sheet
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.keep import AUTO, read_keep
from imagic_lora.training.fit import fit, open_base, result

RANKS = (1, 2, 4, 8, 16, 32)


@contextmanager
def fitted(editor: Editor, case: Case, config: RunConfig) -> Iterator[tuple[Adapter, Store]]:
    """Fits a case; the adapter and its store exist while the context is open."""
    with tempfile.TemporaryDirectory() as folder, closing(editor):
        photo, store = Path(folder) / "photo.png", Store(Path(folder))
        render(case.source).save(photo)
        adapter = result(fit(photo, case.prompt, config, store, "case", base=editor.base))
        assert adapter is not None
        yield adapter, store


def scored(study: Study, case: Case, image: Image.Image) -> dict[str, float]:
    """The measures of an image, shares in percent."""
    score = study.scorer.score(case, image)
    return {measure: factor * float(getattr(score, measure)) for measure, factor in FACTORS.items()}


def study_keep(args: argparse.Namespace) -> None:
    """What ``edit --keep auto`` keeps and what it costs.

    Every case is fitted with the defaults and edited at the default eta, from inverted noise (the default) and from noise. Each edit is
    scored as it is and pasted into its photo by the mask of ``--keep auto``. Background is the error where the animal hides nothing, in
    levels of 255. Photo, edit, kept edit and mask of each case are written to the folder of the store, side by side.
    """
    study, kind = Study(args.base, args.store), kind_of(args.base)
    runs = {name: defaults("lora", change, kind) for name, change in {"defaults": {}, "noise": STARTS["noise"]}.items()}
    images = study.path(args.seed).with_suffix("")
    images.mkdir(exist_ok=True)

    def measure(case: Case) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        editor, config = Editor(study.base), defaults("lora", base=kind).model_copy(update={"seed": case.index})
        with fitted(editor, case, config) as (adapter, _):
            keep = read_keep(adapter, AUTO)
            assert keep is not None
            for name, run in runs.items():
                edits = list(editor.edit(adapter, keep.etas([run.eta]), [case.index], run.edit))
                (kept,) = keep.pasted(edits, [run.eta])
                assert kept.mask is not None
                cells = {"photo": render(case.source), "true edit": render(case.truth), "edit": edits[-1].image, "kept": kept.image}
                row = sheet([[*cells.items(), ("mask", kept.mask.convert("RGB"))]], case.prompt)
                write_png(row, images / f"{case.index:04d}-{name}.png", {"case": case.index})
                rows[name] = {"edit": scored(study, case, edits[-1].image), "kept": scored(study, case, kept.image)}
                rows[name]["mask"] = sum(kept.mask.histogram()[1:]) / (kept.mask.width * kept.mask.height)
        return rows

    settings = [run.model_dump(mode="json") for run in runs.values()]
    cases = progress((case_at(args.seed, index) for index in range(args.cases)), args.cases, "cases")
    found = [study.stored(args.seed, ["keep", case.index, settings], lambda case=case: measure(case)) for case in cases]
    for name in runs:
        rows, parts = [row[name] for row in found], []
        for measure_name in FACTORS:
            before, after = ([row[which][measure_name] for row in rows] for which in ("edit", "kept"))
            parts.append(f"{measure_name} {np.mean(before):.1f} -> {np.mean(after):.1f} ({paired(after, before)})")
        print(f"{name}, {len(rows)} cases, mask {np.mean([row['mask'] for row in rows]):.0%} of the image: {'; '.join(parts)}")


def study_ranks(args: argparse.Namespace) -> None:
    """Quality of compressed full adapters; takes some minutes.

    Fits full adapters and compresses each to several ranks. For every rank it prints the lost share of the weight change (a relative norm),
    the size, the mean absolute difference of the edit from that of the full adapter in levels of 255, and how many edits the judge counts
    as done and as successes.
    """
    study, config = Study(args.base, args.store), defaults("full", {"memory": {"device": "cpu", "dtype": "fp32"}})
    editor = Editor(open_base(config))

    def measure(case: Case) -> dict[str, dict[str, float]]:
        def edited(adapter: Adapter) -> Image.Image:
            (edit,) = editor.edit(adapter, [config.eta], [case.index], config.edit)
            return edit.image

        with fitted(editor, case, config) as (full, store):
            reference = edited(full)
            rows = {"full": {"error": 0.0, "size": full.size, "pixels": 0.0, **scored(study, case, reference)}}
            for rank in RANKS:
                editor.close()
                small = compress(full, editor.base, rank, store, f"rank-{rank}")
                image, error = edited(small), small.record.compressed
                assert error is not None
                pixels = float(np.abs(np.asarray(image, dtype=float) - np.asarray(reference, dtype=float)).mean())
                rows[str(rank)] = {"error": error.error, "size": small.size, "pixels": pixels, **scored(study, case, image)}
        return rows

    cases = progress((case_at(args.seed, index) for index in range(args.cases)), args.cases, "cases")
    key = ["ranks", config.model_dump(mode="json"), RANKS]
    found = [study.stored(args.seed, [*key, case.index], lambda case=case: measure(case)) for case in cases]
    print("| rank | norm lost | MB | pixels apart | attributes | success |\n|---|---|---|---|---|---|")
    for rank in (*map(str, RANKS), "full"):
        rows: list[Mapping[str, float]] = [row[rank] for row in found]
        error, size, pixels = (np.mean([row[name] for row in rows]) for name in ("error", "size", "pixels"))
        done, right = (sum(row[name] > 0 for row in rows) for name in ("attributes", "success"))
        print(f"| {rank} | {error:.1%} | {size / 1e6:.2f} | {pixels:.2f} | {done} of {len(rows)} | {right} of {len(rows)} |")
