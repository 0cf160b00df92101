"""``make torture``: runs every fault injection at full size, two at a time, and prints a table of the results."""

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

TORTURES = {  # number of cases and description; the longest first
    "kills": (200, "killed at any time, every fourth while saving; resumed, equal to an uninterrupted run"),
    "numbers": (10_000, "NaN and infinity in latents, losses, gradients, weights; both stages, modes lora and full"),
    "interruptions": (1_500, "an exception at steps inside every change of a base or of a name; Ctrl-C at any time; equal to before"),
    "disk": (10_000, "a full disk at every write of an adapter, of a checkpoint, of a whole fit"),
    "batches": (50, "the driver of a batch killed at any time; completed, every photo exactly once, equal to an uninterrupted one"),
    "photos": (500, "malformed and unusual images: read correctly, or rejected"),
    "power": (1_000_000, "power failure after every file operation of a save; unflushed data is lost"),
    "races": (50, "two and three writers of one name: one succeeds, the others report it"),
    "bits": (300, "truncations, and as many flipped bits, of adapters and checkpoints: rejected"),
    "bases": (60, "pickles, code and hostile JSON in a base: nothing runs"),
    "places": (1_000, "links, pipes, plain files and folders without rights in a store: named, never followed, nothing stranded"),
    "strangers": (60, "pickles and hostile JSON in adapters and checkpoints: nothing runs"),
    "texts": (120, "hostile names and prompts in every output of text: always escaped"),
}
SEED = 1


def run(name: str) -> tuple[list[str], float]:
    """The results of one torture, and its duration in seconds."""
    torch.set_grad_enabled(True)  # an exception inside torch's own context managers, as "interruptions" makes them, leaves it off
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = list(import_module(f"torture.{name}").torture(TORTURES[name][0], SEED, Path(folder)))
    return results, time.perf_counter() - start


def main() -> int:
    """Prints the results as they arrive, then the failures; returns 1 if there are any."""
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
