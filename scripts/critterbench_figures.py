"""The figures of docs/internals/critterbench.md: ``python scripts/critterbench_figures.py outputs/bench/critters-11``.

``critterbench.png`` shows the edits of the first cases of a run of ``imagic-lora bench critters`` by several methods.
``critterbench-cost.png`` shows the scores of every method against its cost, and those of imagic-lora with fewer and with more steps of both
stages; the script runs the latter on cases of a seed that is used for no reported result. The tables of the run are printed as Markdown.
With ``--sheet FILE`` only the sheet is drawn, of ``--methods``: docs/subjects.png is that of bench critters --cases 16 --seed 52 --methods
imagic-lora,dreambooth,textual-inversion.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from measuring import table
from PIL import Image

from imagic_lora.bench.cases import case_at
from imagic_lora.bench.catalogue import budgeted
from imagic_lora.bench.critters import Bench
from imagic_lora.bench.page import tables
from imagic_lora.bench.summary import summarise
from imagic_lora.methods.imagic import Imagic
from imagic_lora.photos.sheet import sheet

DOCS = Path(__file__).parent.parent / "docs"
METHODS = ("oracle", "imagic-lora", "imagic-full", "embedding-only", "imagic-lora-noise", "reference-retuned", "sdedit-0.65", "prompt-only")


def first_cases(folder: Path, seed: int, count: int, methods: Sequence[str] = METHODS) -> Image.Image:
    """A sheet with one row per case: the photo, then the edits of the methods; ``oracle`` is the true edit."""
    rows = []
    files = [(name, "truth" if name == "oracle" else name) for name in methods]
    for index in range(count):
        case, where = case_at(seed, index), folder / "cases" / f"{seed}-{index:04d}"
        cells = [(case.prompt, "source"), *files]
        rows.append([(label, Image.open(where / f"{name}.png")) for label, name in cells])
    return sheet(rows, f"CritterBench, the first {count} cases of seed {seed}, not selected", cell=112)


def budgets(folder: Path, times: list[float], seed: int, cases: int, workers: int) -> dict[str, Any]:
    """The summary of imagic-lora with the steps of both stages multiplied by each factor and the learning rates divided by it."""
    methods = [Imagic(f"steps x{factor:g}", budgeted("lora", factor)) for factor in times]
    bench = Bench(seed, cases, methods, folder)
    return summarise(bench, list(bench.results(workers)))


def cost(summary: dict[str, Any], ours: dict[str, Any], note: str) -> Any:
    """A figure of success and of the attributes alone against the number of denoiser evaluations."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharex=True, layout="constrained")
    for axis, measure in zip(axes, ("success", "attributes"), strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20")(range(20)))
        for name, row in summary["methods"].items():
            if row["cost"] and row["cost"]["evaluations"]:
                _point(axis, row, measure, name)
        curve = sorted(ours["methods"].values(), key=lambda row: row["cost"]["evaluations"])
        x, y = [row["cost"]["evaluations"] for row in curve], [100 * row[measure]["mean"] for row in curve]
        axis.plot(x, y, "k--", marker="s", label=note)
        axis.axhline(100 * summary["methods"]["oracle"][measure]["mean"], color="green", linewidth=1, label="oracle")
        axis.set(xscale="log", ylim=(0, 101), xlabel="forward and backward passes of the denoiser per image", ylabel=f"{measure}, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def _point(axis: Any, row: dict[str, Any], measure: str, name: str) -> None:
    mean, low, high = (100 * row[measure][key] for key in ("mean", "low", "high"))
    marker, size = ("*", 18) if name == "imagic-lora" else ("o", 6)  # the larger marker is drawn behind the others
    axis.errorbar(row["cost"]["evaluations"], mean, [[mean - low], [high - mean]], fmt=marker, ms=size, zorder=-size, capsize=3, label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="output folder of imagic-lora bench critters")
    parser.add_argument("--times", type=float, nargs="+", default=[0.25, 1.0, 4.0], help="multiples of the default steps, for the curve")
    parser.add_argument("--cases", type=int, default=8, help="number of cases for the curve")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases for the curve")
    parser.add_argument("--rows", type=int, default=12, help="number of cases in critterbench.png")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="columns of the sheet; oracle is the true edit")
    parser.add_argument("--sheet", type=Path, help="draw only the sheet, into this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    summary = json.loads((args.bench / "summary.json").read_text(encoding="utf-8"))
    if args.sheet:
        first_cases(args.bench, summary["seed"], args.rows, args.methods).save(args.sheet)
        return
    for title, one in tables(summary).items():
        print(f"\n{title}\n")
        table(one.columns, one.rows)
    first_cases(args.bench, summary["seed"], args.rows, args.methods).save(DOCS / "critterbench.png")
    ours = budgets(args.bench / "budgets", args.times, args.seed, args.cases, args.workers)
    note = f"imagic-lora, steps x\n{', '.join(f'{factor:g}' for factor in args.times)}\n({args.cases} cases of seed {args.seed})"
    cost(summary, ours, note).savefig(DOCS / "critterbench-cost.png", dpi=110)
    (args.bench / "budgets.json").write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {DOCS / 'critterbench.png'} and {DOCS / 'critterbench-cost.png'}")


if __name__ == "__main__":
    main()
