"""Photos per hour of ``imagic-lora batch``: one by one, together, and on Ray: ``python scripts/bench_batch.py``.

Every way is the command as a user gives it, with ``--threads`` threads a process, on a list of rendered photos and a store of its own.
Ways run in turn, in another order each round, and nothing else should run meanwhile. Times are of the clock, with the start of the
processes and the loading of the base. Memory is the largest sum over the processes of the command and those of Ray, in which shared pages
count once.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.critters import caption, render, scene_at

WAYS: dict[str, list[str]] = {
    "one by one": [],
    "together": ["--together", "8"],
    "ray, one worker": ["--ray", "local", "--max-in-flight", "1"],
    "ray, two workers": ["--ray", "local", "--max-in-flight", "2"],
}


def photos(folder: Path, count: int) -> Path:
    """Renders photos, and writes the list of them."""
    with (folder / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["photo", "prompt", "name", "seed"])
        for k in range(count):
            scene = scene_at("heldout", k)
            render(scene).save(folder / f"{k}.png")
            table.writerow([f"{k}.png", caption(scene), f"photo-{k}", k])
    return folder / "photos.csv"


def memory(main: int) -> int:
    """Bytes of a process, its children, and the processes of Ray, whose workers are no children."""
    with suppress(psutil.Error):  # it has ended
        found = {main, *(one.pid for one in psutil.Process(main).children(recursive=True))}
        found |= {one.pid for one in psutil.process_iter(["cmdline"]) if "ray" in " ".join((one.info["cmdline"] or [])[:2]).lower()}
        return sum(map(bytes_of, found))
    return 0


def bytes_of(process: int) -> int:
    """Bytes of a process, where pages that several share count as a part of them; 0 after its end."""
    with suppress(psutil.Error):
        return psutil.Process(process).memory_full_info().pss
    return 0


def run(command: list[str], threads: int) -> tuple[float, int]:
    """Seconds and peak memory of a command.

    Raises:
        RuntimeError: the command failed.
    """
    start, peak, done = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )

    def watch() -> None:
        nonlocal peak
        while not done.wait(10):  # each look takes a tenth of a second of a core
            peak = max(peak, memory(process.pid))

    threading.Thread(target=watch, daemon=True).start()
    output, _ = process.communicate()
    done.set()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode} of {' '.join(command)}:\n{output[-2000:]}")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.2, help="share of the training steps of the recipe of critters")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    recipe, found = RECIPES["critters"]["lora"], {way: list[float]() for way in args.ways}
    steps = [f"--{stage}.steps={max(1, round(args.share * recipe[stage]['steps']))}" for stage in ("embed", "tune")]
    with tempfile.TemporaryDirectory() as folder:
        table = photos(Path(folder), args.photos)
        for number in range(args.rounds):
            for way in args.ways[number % 2 :] + args.ways[: number % 2]:
                place = Path(folder) / f"{number}-{way}"
                own = ["--store", str(place / "adapters"), "--out", str(place / "out"), *steps, *WAYS[way]]
                command = [sys.executable, "-m", "imagic_lora", "batch", str(table), "--base", "critters", "--device", "cpu", *own]
                seconds, peak = run(command, args.threads)
                found[way].append(3600 * args.photos / seconds)
                print(f"{way:18} {found[way][-1]:7.0f} photos an hour, {seconds:6.1f} s, peak {peak / 2**30:.2f} GiB", flush=True)
    middle = {way: median(values) for way, values in found.items()}
    for one, other in (("together", "one by one"), ("ray, two workers", "ray, one worker"), ("ray, one worker", "one by one")):
        if one in middle and other in middle:
            ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
            print(f"{one} / {other}: {median(ratios):.2f} (of {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
