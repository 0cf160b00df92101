"""Settings compared on CritterBench through fit() itself: ``python scripts/study_settings.py "tune.steps=240" "embed.steps=240"``.

A variant is a list of changes of the defaults, ``key=value`` separated by spaces, with the keys of a settings file. The defaults are always
the first row. Every case is fitted and edited as the command line does it, one at a time; ``study_critters.py`` is faster, but it has a
training loop of its own, without early stopping. The table has the scores with their 95% intervals, the paired difference in success to the
defaults, the training steps done, and the passes through the denoiser, evaluations of the relative loss included if a variant stops early.
Choose on other seeds than those of the reported results. An interrupted run continues from its folder. What early stopping saves and costs:

    python scripts/study_settings.py "tune.steps=240" "tune.steps=240 monitoring.early_stop=tune" \\
        "tune.steps=240 monitoring.early_stop=tune monitoring.patience=2 monitoring.min_improvement=0.02" \\
        "embed.steps=240" "embed.steps=240 monitoring.early_stop=embed" "embed.steps=240 tune.steps=240 monitoring.early_stop=both"
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.critters import Bench
from imagic_lora.bench.summary import OURS, summarise
from imagic_lora.cli.console import progress
from imagic_lora.core.config import TunedMode
from imagic_lora.core.settings import merged
from imagic_lora.methods.imagic import Imagic

SCORES = ("success", "attributes", "aligned", "kept")


def variant(text: str, mode: TunedMode) -> Imagic:
    """The method with changes of the defaults; its row has a name that a file can have.

    Args:
        text: ``key=value``, separated by spaces.
        mode: the mode.
    """
    changes: dict[str, Any] = {}
    for change in text.split():
        path, _, value = change.partition("=")
        nested: Any = yaml.safe_load(value)
        for part in reversed(path.split(".")):
            nested = {part: nested}
        changes = merged(changes, nested)
    return Imagic(re.sub(r"[^A-Za-z0-9.=_]+", ",", text), defaults(mode, changes))


def row_text(name: str, row: dict[str, Any]) -> str:
    """A row of the Markdown table.

    Args:
        name: name of the row.
        row: its part of the summary of a benchmark.
    """
    scores = [f"{100 * one['mean']:.0f} [{100 * one['low']:.0f}, {100 * one['high']:.0f}]" for one in (row[score] for score in SCORES)]
    against = row.get("against", {}).get("success")  # positive where the defaults are better
    change = f"{-100 * against['mean']:+.0f} [{-100 * against['high']:+.0f}, {-100 * against['low']:+.0f}]" if against else ""
    cost = row["cost"]
    spent = [f"{cost['backward']:.0f}", f"{cost['evaluations']:.0f}"] if cost else ["", ""]
    return f"| {' | '.join([name, *scores, change, *spent])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help='changes of the defaults, such as "tune.steps=240 monitoring.early_stop=tune"')
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/study-settings"))
    given = parser.parse_args()
    methods = [Imagic(OURS, defaults(given.mode)), *(variant(text, given.mode) for text in given.variants)]
    bench = Bench(given.seed, given.cases, methods, given.out / f"{given.mode}-{given.seed}")
    results = list(progress(bench.results(given.workers), given.cases * len(methods), "cases x variants"))
    summary = summarise(bench, results)
    (bench.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"| {' | '.join(['', *(f'{score}, %' for score in SCORES), 'success, to the defaults', 'training steps', 'passes'])} |")
    print(f"|{' --- |' * 8}")
    for name, row in summary["methods"].items():
        print(row_text(name, row))
    for error in summary["errors"]:
        print(error["method"], error["case"], error["error"].splitlines()[-1])


if __name__ == "__main__":
    main()
