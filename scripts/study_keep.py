"""What ``edit --keep auto`` keeps and what it costs: ``python scripts/study_keep.py --cases 60``.

Every case of CritterBench is fitted with the defaults and edited at the default eta, from inverted noise (the default) and from noise. Each
edit is scored as it is and pasted into its photo by the mask of ``--keep auto``. Background is the error where the animal hides nothing, in
levels of 255 (:func:`imagic_lora.bench.scores.drift`). Differences are paired, with 95% intervals. Photo, edit, kept edit and mask of each
case are written to the output folder, side by side, and the scores to ``scores.jsonl``, from which a later run continues.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import STARTS, defaults
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Scorer
from imagic_lora.bench.summary import bootstrapped
from imagic_lora.core.config import MemoryConfig, RunConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.critters.judge import Judge
from imagic_lora.photos.png import write_png
from imagic_lora.photos.sheet import sheet
from imagic_lora.sampling.editor import Edit, Editor
from imagic_lora.sampling.keep import AUTO, read_keep
from imagic_lora.training.fit import fit, result

MEASURES = {"success": 100, "attributes": 100, "aligned": 100, "kept": 100, "background": 1, "psnr": 1}  # factors to percent


def runs() -> dict[str, RunConfig]:
    """The settings of the edits by the name of their start; the fit is that of the defaults."""
    changes = {"defaults": {}, "noise": STARTS["noise"]}
    return {name: defaults("lora", change) for name, change in changes.items()}


def edited(base: Base, case: Case) -> Iterator[tuple[str, Edit, Edit]]:
    """Fits a case, and yields for each start its name, the edit, and the edit that is pasted into the photo."""
    with tempfile.TemporaryDirectory() as folder, closing(Editor(base)) as editor:
        photo = Path(folder) / "photo.png"
        render(case.source).save(photo)
        config = defaults("lora").model_copy(update={"seed": case.index})
        adapter = result(fit(photo, case.prompt, config, Store(Path(folder)), "case", base=base))
        assert adapter is not None
        keep = read_keep(adapter, AUTO)
        assert keep is not None
        for name, run in runs().items():
            edits = list(editor.edit(adapter, keep.etas([run.eta]), [case.index], run.edit))
            (kept,) = keep.pasted(edits, [run.eta])
            yield name, edits[-1], kept


def scored(base: Base, case: Case, scorer: Scorer, out: Path) -> dict[str, Any]:
    """The scores of a case by start, before and after ``--keep auto``, with the share of the image in the mask; writes its images."""
    rows: dict[str, Any] = {}
    for name, edit, kept in edited(base, case):
        assert kept.mask is not None
        images = {"photo": render(case.source), "true edit": render(case.truth), "edit": edit.image, "kept": kept.image}
        cells = [*images.items(), ("mask", kept.mask.convert("RGB"))]
        write_png(sheet([cells], case.prompt), out / f"{case.index:04d}-{name}.png", {"case": case.index})
        rows[name] = {"edit": measured(scorer, case, edit.image), "kept": measured(scorer, case, kept.image)}
        rows[name]["kept"]["mask"] = sum(kept.mask.histogram()[1:]) / (kept.mask.width * kept.mask.height)
    return rows


def measured(scorer: Scorer, case: Case, image: Image.Image) -> dict[str, float]:
    """The measures of an image."""
    score = scorer.score(case, image)
    return {measure: factor * float(getattr(score, measure)) for measure, factor in MEASURES.items()}


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """The means of the cases before and after, and the paired differences."""
    parts = []
    for measure in MEASURES:
        before, after = ([row[name][which][measure] for row in rows] for which in ("edit", "kept"))
        change = bootstrapped([b - a for a, b in zip(before, after, strict=True)])
        assert change is not None
        first, second = (sum(values) / len(values) for values in (before, after))
        parts.append(f"{measure} {first:.1f} -> {second:.1f} ({change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}])")
    share = sum(row[name]["kept"]["mask"] for row in rows) / len(rows)
    return f"{name}, {len(rows)} cases, mask {share:.0%} of the image: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    parser.add_argument("--base", type=Path, default=CRITTERS, help="folder of the base")
    parser.add_argument("--out", type=Path, default=Path("outputs/keep"), help="output folder")
    args = parser.parse_args()
    logging.disable_progress_bar()
    memory = MemoryConfig(device="cpu", dtype="fp32", optimizer="adam")
    base = load_base("critters" if args.base == CRITTERS else str(args.base), resolve_runtime(memory))
    scorer = Scorer(Judge.load(), CritterAlignment.load())
    out = args.out / f"{base.fingerprint[:12]}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    store = out / "scores.jsonl"
    known = {row["case"]: row["rows"] for row in map(json.loads, store.open())} if store.exists() else {}
    for index in range(args.cases):
        if index not in known:
            known[index] = scored(base, case_at(args.seed, index), scorer, out)
            with store.open("a") as file:
                file.write(json.dumps({"case": index, "rows": known[index]}) + "\n")
            print(f"case {index + 1} of {args.cases}", flush=True)
    for name in runs():
        print(line(name, [known[index] for index in range(args.cases)]))


if __name__ == "__main__":
    main()
