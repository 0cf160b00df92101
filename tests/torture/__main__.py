"""``make torture``: every torture at its full size, two at a time, and a table of what came of it."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

TORTURES = {  # the longest first: how many cases, and what they are
    "kills": (200, "killed at any time, every fourth while saving; resumed, equal to a run that was not"),
    "numbers": (10_000, "NaN and infinity in latents, losses, gradients, weights; both stages, both modes"),
    "disk": (10_000, "a full disk at every write of an adapter, of a checkpoint, of a whole fit"),
    "photos": (500, "malformed and odd images: right, or refused"),
    "power": (1_000_000, "the power fails after every file operation of a save, what was not flushed is lost"),
    "races": (50, "two and three writers of one name: one wins, the others say so"),
    "bits": (300, "truncations, and as many flipped bits, of adapters and checkpoints: refused"),
    "bases": (60, "pickles, code and hostile JSON in a base: nothing runs"),
    "strangers": (60, "pickles and hostile JSON in adapters and checkpoints: nothing runs"),
    "texts": (120, "hostile names and prompts in every place that shows text: nothing gets out"),
}
SEED = 1


def run(name: str) -> tuple[list[str], float]:
    """What each case of a torture came to, and the seconds that it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = list(import_module(f"torture.{name}").torture(TORTURES[name][0], SEED, Path(folder)))
    return results, time.perf_counter() - start


def main() -> int:
    """Prints the table as it comes, then what failed; 1 if anything did."""
    names = sys.argv[1:] or list(TORTURES)
    console, table = Console(width=140), Table("torture", "cases", "passed", "failed", "seconds", "what")
    failures: list[str] = []
    passed = 0
    torch.set_num_threads(1)  # before anything is forked
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(run, name): name for name in names}
        for done in as_completed(running):
            name, (results, seconds) = running[done], done.result()
            wrong = [text for text in results if text]
            table.add_row(name, *map(str, (len(results), len(results) - len(wrong), len(wrong))), f"{seconds:.0f}", TORTURES[name][1])
            console.print(f"{name}: {len(results)} cases, {len(wrong)} failed, {seconds:.0f} s", highlight=False)
            failures += [f"{name}: {text}" for text in wrong]
            passed += len(results) - len(wrong)
    console.print(table)
    for text in failures:
        console.print(text, markup=False, highlight=False)
    console.print(f"{passed} passed, {len(failures)} failed", highlight=False)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
