"""The table of predicted peaks in docs/guide/memory.md: ``python scripts/plan_table.py`` (``make plan-table``).

Flow transformers are rehearsed where imagic_lora/memory/rehearsed.json lacks a run, which takes a minute or more each, and added to that
file, which is part of the package. ``--fresh`` rehearses all of them. Nothing here is measured on a card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from measuring import settings, table

from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.config import Mode, Preset, RunConfig
from imagic_lora.memory import rehearsed
from imagic_lora.memory.plan import assume
from imagic_lora.memory.prediction import predict

STORE = Path(rehearsed.__file__).with_name("rehearsed.json")
PAGE = Path("docs/guide/memory.md")
START, END = "<!-- written by scripts/plan_table.py -->\n", "<!-- end of the written table -->\n"
UNETS = ("sd15", "sd21", "sdxl")
FLOWS = ("klein-base-4b", "sd35-medium", "sd3-medium", "klein-base-9b")
PRESETS: tuple[Preset, ...] = ("8gb", "12gb", "16gb", "24gb")
MODES: tuple[Mode, ...] = ("lora", "full")


class Case(NamedTuple):
    """A row of the table, and the run of one of its cells."""

    base: str
    mode: Mode
    preset: Preset

    def run(self) -> RunConfig:
        """The settings of the run."""
        return settings(self.base, self.mode, self.preset)


def cases() -> Iterator[Case]:
    """The runs of flow transformers, those of most use first."""
    for mode in MODES:
        for base in FLOWS:
            yield from (Case(base, mode, preset) for preset in PRESETS)


def keys(case: Case) -> list[str]:
    """The names under which a run is stored: of the fit, and of edits with its adapter."""
    built, run = architecture(case.base), case.run()
    return [key(built, run, asdict(assume(run))) for key in (rehearsed.fit_key, rehearsed.edit_key)]


def rehearse_into(store: dict[str, Any], case: Case) -> None:
    """Rehearses a run and adds it to the file."""
    from imagic_lora.training.rehearsing import rehearsal

    run, built = case.run(), architecture(case.base)
    kept: list[rehearsed.Rehearsed] = []
    with patch.object(rehearsal, "remember", lambda *arguments: kept.append(arguments[-1])):
        plan = rehearsal.rehearse(built, run, assume(run))
    store["plans"] |= rehearsed.entries(built, run, asdict(assume(run)), kept[0])
    STORE.write_text(json.dumps(store, sort_keys=True, indent=0) + "\n", encoding="utf-8")
    print(f"{case}: {plan.peak_bytes / 2**30:.1f} GiB, {plan.worst}", flush=True)


def cell(case: Case) -> str:
    """A peak in GiB and its stage; in brackets if it exceeds the card."""
    plan = predict(architecture(case.base), case.run())
    text = f"{plan.peak_bytes / 2**30:.1f} {plan.worst}"
    return text if plan.fits(case.preset) else f"({text})"


def rows() -> Iterator[list[str]]:
    """The rows of the table."""
    for base in (*UNETS, *FLOWS):
        side = architecture(base).resolution
        for mode in MODES:
            yield [f"`{base}`, {side} px", mode, *(cell(Case(base, mode, preset)) for preset in PRESETS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="rehearse runs that the file has, too")
    args = parser.parse_args()
    store = {"plans": {}} if args.fresh else json.loads(STORE.read_text(encoding="utf-8"))
    store["plans"] = {name: plan for name, plan in store["plans"].items() if name in set(chain.from_iterable(map(keys, cases())))}
    for case in cases():
        if keys(case)[0] not in store["plans"]:
            rehearse_into(store, case)
    rehearsed._shipped.cache_clear()
    lines = table(("base", "mode", *(f"`--preset {preset}`" for preset in PRESETS)), rows())
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2], encoding="utf-8")
    print(f"wrote {PAGE} and {STORE}")


if __name__ == "__main__":
    main()
