"""The driver of a batch is killed at any time, up to three times, also during the load of the base; the same command completes it."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicWarning
from imagic_lora.fleet.batch import RESULTS, Batch, grouped, run_here
from imagic_lora.fleet.outcome import Outcome
from imagic_lora.fleet.table import Entry, Table
from imagic_lora.fleet.work import Work

from .small import World, apart

PHOTOS = 3
STEPS = 4


@cache
def entries(folder: Path) -> list[Entry]:
    """The checked list."""
    world = World(folder)
    for k in range(PHOTOS):
        Image.new("RGB", (24 + k, 20), ("red", "green", "blue")[k]).save(folder / f"p{k}.png")
    (folder / "list.csv").write_text("photo,prompt,seed\n" + "".join(f"p{k}.png,a cat,{k}\n" for k in range(PHOTOS)))
    stages = {"embed": {"steps": STEPS, "space": "output"}, "tune": {"steps": STEPS, "rank": 2}, "edit": {"steps": 1}}
    flags = {"base": str(world.base), "memory": {"device": "cpu"}, "checkpoint": {"steps": 1}, **stages}
    return Table(folder / "list.csv", flags, {}).entries()


def go_on(folder: Path, place: Path, seeds: tuple[int, ...]) -> int:
    """What the command does: finds out what is left, does it, writes the page. Returns the number of photos that were left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImagicWarning)
        batch = Batch(folder / "list.csv", entries(folder), Work(place / "store", place / "out", (0.7,) if seeds else (), seeds))
        with batch.locked():
            left = batch.left(retry_failed=False)
            batch.begin()
            for item in run_here(grouped(left), batch.work, lambda: False):
                if isinstance(item, Outcome):
                    batch.record(item)
            batch.write_page()
    return len(left)


def contents(place: Path) -> dict[str, bytes]:
    """The adapters but their records, and the images; nothing hidden may be left."""
    store = place / "store"
    assert sorted(path.name for path in store.iterdir()) == [f"p{k}" for k in range(PHOTOS)], sorted(store.iterdir())
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "adapter.json" and path.suffix != ".html"]
    return {str(path.relative_to(place)): path.read_bytes() for path in files if path.name != RESULTS and path.name[0] != "."}


@cache
def whole(folder: Path, seeds: tuple[int, ...]) -> tuple[dict[str, bytes], float]:
    """What a batch comes to that nothing interrupts, and its seconds."""
    place, start = folder / f"whole-{len(seeds)}", time.perf_counter()
    assert apart(partial(go_on, folder, place, seeds)) == PHOTOS
    return contents(place), time.perf_counter() - start


def case(folder: Path, place: Path, rng: random.Random) -> str:
    """Kills a batch up to three times, then lets it finish; returns the failure or an empty string."""
    seeds = rng.choice([(), (0,)])
    expected, seconds = whole(folder, seeds)
    story, left = [f"{len(seeds)} edits"], None
    try:
        for kills in reversed(range(rng.choice([2, 2, 3, 4]))):
            after = rng.uniform(0, seconds) if kills else None
            left = apart(partial(go_on, folder, place, seeds), after)
            story.append(f"killed after {after} s" if left is None else f"finished, {left} were left")
        assert left is not None
        assert contents(place) == expected, "its files differ from those of a batch that was not interrupted"
        rows = [json.loads(line) for line in (place / "out" / RESULTS).read_text().splitlines()]
        assert sorted(row["name"] for row in rows) == [f"p{k}" for k in range(PHOTOS)], "the results do not hold every photo once"
        assert all(row["state"] == "done" for row in rows)
        assert Store(place / "store").unfinished() == []
        assert apart(partial(go_on, folder, place, seeds)) == 0, "something is done again"
    except Exception as error:
        return f"{'; '.join(story)}: {type(error).__name__}: {error}"
    return ""


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Each case has a store of its own."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    entries(shared)
    for number in range(cases):
        place = folder / f"case-{number}"
        wrong = case(shared, place, random.Random(f"{seed} {number}"))
        yield wrong and f"case {number}: {wrong}"
        shutil.rmtree(place, ignore_errors=True)
