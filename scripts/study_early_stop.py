"""What early stopping saves and costs: ``python scripts/study_early_stop.py --cases 40 --workers 2``.

Every case of CritterBench is fitted with the default number of steps, with several times as many, and with that many but early stopping of
stage 1, stage 2 or both, for several patiences and smallest improvements. The table has the scores with their 95% intervals, the paired
difference in success to the defaults, the training steps done, and the passes of the denoiser, evaluations of the relative loss included.
Choose on other seeds than those of the reported results. An interrupted run continues from its folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.critters import Bench
from imagic_lora.bench.summary import OURS, summarise
from imagic_lora.cli.console import progress
from imagic_lora.core.config import TunedMode
from imagic_lora.methods.imagic import Imagic

SCORES = ("success", "attributes", "aligned", "kept")


def variants(mode: TunedMode, times: int, patiences: list[int], improvements: list[float]) -> Iterator[Imagic]:
    """The methods of the study: the defaults, more steps, and more steps with early stopping.

    Args:
        mode: the mode of all of them.
        times: the factor of the number of steps of both stages; the rates stay.
        patiences: patiences of early stopping.
        improvements: smallest improvements of early stopping.
    """
    config = defaults(mode)
    longer = {"embed": {"steps": times * config.embed.steps}, "tune": {"steps": times * config.tune.steps}}
    yield Imagic(OURS, config)
    yield Imagic(f"steps-x{times}", defaults(mode, longer))
    for patience in patiences:
        for improvement in improvements:
            for stages in ("embed", "tune", "both"):
                early = {"early_stop": stages, "patience": patience, "min_improvement": improvement}
                kept = longer if stages == "both" else {stages: longer[stages]}  # the other stage has its default number of steps
                yield Imagic(f"{stages}-patience{patience}-min{improvement:g}", defaults(mode, {**kept, "monitoring": early}))


def row_text(name: str, row: dict[str, Any]) -> str:
    """A row of the Markdown table.

    Args:
        name: name of the row.
        row: its part of the summary of a benchmark.
    """
    scores = [f"{100 * one['mean']:.0f} [{100 * one['low']:.0f}, {100 * one['high']:.0f}]" for one in (row[score] for score in SCORES)]
    against = row.get("against", {}).get("success")
    change = f"{-100 * against['mean']:+.0f} [{-100 * against['high']:+.0f}, {-100 * against['low']:+.0f}]" if against else ""
    cost = row["cost"]
    spent = [f"{cost['backward']:.0f}", f"{cost['evaluations']:.0f}"] if cost else ["", ""]
    return f"| {' | '.join([name, *scores, change, *spent])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--times", type=int, default=4, help="factor of the number of steps")
    parser.add_argument("--patience", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--min-improvement", type=float, nargs="+", default=[0.005, 0.02])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/study-early-stop"))
    given = parser.parse_args()
    methods = list(variants(given.mode, given.times, given.patience, given.min_improvement))
    bench = Bench(given.seed, given.cases, methods, given.out / f"{given.mode}-{given.seed}")
    results = list(progress(bench.results(given.workers), given.cases * len(methods), "cases x variants"))
    summary = summarise(bench, results)
    (bench.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"| {' | '.join(['', *(f'{score}, %' for score in SCORES), 'success against the defaults', 'training steps', 'passes'])} |")
    print(f"|{' --- |' * 8}")
    for name, row in summary["methods"].items():
        print(row_text(name, row))
    for error in summary["errors"]:
        print(error["method"], error["case"], error["error"].splitlines()[-1])


if __name__ == "__main__":
    main()
