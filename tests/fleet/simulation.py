"""A batch of many adapters by stub fits that take no time: what is left is the cost of the store, the results and the contact sheet.

``python tests/fleet/simulation.py 10000``: copies of one adapter of the size of a LoRA of ``critters`` are stored under
the locks and atomic writes of real fits. Prints JSON: seconds and peak memory of each part. ``--linked`` links the files
of the adapters instead of copying them and leaves the flushes out: the time of the disk is that of a run without it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter, atomic_folder
from imagic_lora.adapters.record import RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.adapters.writing import pieces
from imagic_lora.fleet.batch import Batch, grouped
from imagic_lora.fleet.outcome import Outcome
from imagic_lora.fleet.table import Entry, Table
from imagic_lora.fleet.work import Work

EXAMPLE = Path(__file__).parents[2] / "adapters"


def stub_fit(example: Adapter, store: Store, entry: Entry, linked: bool) -> Outcome:
    """What a fit does to a store: checks the name twice under its lock, writes the adapter atomically.

    Args:
        example: the adapter that is copied.
        store: the store.
        entry: the line of the list.
        linked: whether the files but the record are hard links to those of the example.
    """
    update = {"name": entry.name, "prompt": entry.prompt, "config": entry.config}
    record = example.record.model_copy(update=update)

    def fill(writer: AtomicWriter) -> None:
        for file, digest in example.record.files.items():
            if linked:
                (writer.folder / file).hardlink_to(example.folder / file)
                writer.files[file] = digest
            else:
                writer.write(file, pieces(example.folder / file))

    with store.locked(entry.name) as held:
        held.check_free(entry.name, overwrite=False)
        held.check_free(entry.name, overwrite=False)
        with atomic_folder(store.root / entry.name) as writer:
            fill(writer)
            writer.write_manifest(RECORD, record)
    return Outcome(entry, store.root / entry.name, 0.1, {"relative_loss": {"embed": 0.9}})


def peak_mib() -> float:
    """The peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def simulate(folder: Path, count: int, linked: bool) -> dict[str, Any]:
    """Runs the batch, then ``list``, the resumed batch and the contact sheet."""
    shutil.copytree(EXAMPLE / "rex-jumps", folder / "example" / "rex-jumps")
    example = Store(folder / "example").read("rex-jumps")
    photos = folder / "photos"
    photos.mkdir()
    data = (example.folder / "source.png").read_bytes()
    for k in range(count):
        (photos / f"p{k:05d}.png").write_bytes(data)
    (folder / "list.csv").write_text("photo,prompt,seed\n" + "".join(f"photos/p{k:05d}.png,a dog jumping,{k}\n" for k in range(count)))
    found: dict[str, Any] = {"count": count}

    def timed(name: str, start: float) -> None:
        found[name] = round(time.perf_counter() - start, 2)

    start = time.perf_counter()
    entries = Table(folder / "list.csv", {"base": "critters", "memory": {"device": "cpu"}}, {}).entries()
    timed("checking the list", start)
    batch, store = Batch(folder / "list.csv", entries, Work(folder / "store", folder / "out")), Store(folder / "store")
    with batch.locked():
        batch.begin()
        start, tenth = time.perf_counter(), max(1, count // 10)
        writing = recording = 0.0
        for k, (entry,) in enumerate(grouped(batch.left(False)), 1):
            before = time.perf_counter()
            outcome = stub_fit(example, store, entry, linked)
            stored = time.perf_counter()
            batch.record(outcome)
            writing, recording = writing + stored - before, recording + time.perf_counter() - stored
            if k % tenth == 0:
                found[f"ms a photo up to {k}"] = {
                    "store": round(1000 * writing / tenth, 1),
                    "record and thumbnails": round(1000 * recording / tenth, 1),
                }
                writing = recording = 0.0
        timed("all stub fits", start)
        start = time.perf_counter()
        page = batch.write_page()
        timed("contact sheet", start)
    found["contact sheet MB"] = round(page.stat().st_size / 1e6, 2)
    found["peak MiB of the driver"] = round(peak_mib())
    start = time.perf_counter()
    again = Batch(folder / "list.csv", entries, Work(folder / "store", folder / "out"))
    found["left for a second run"] = len(again.left(False))
    again.begin()
    timed("second run", start)
    code = "import sys; from imagic_lora.cli.app import main; main(sys.argv[1:]); print(open('/proc/self/status').read(), file=sys.stderr)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "--store", str(folder / "store")], capture_output=True, text=True, check=True
    )
    timed("list", start)
    found["list lines"], found["list MiB"] = len(done.stdout.splitlines()), round(int(done.stderr.split("VmHWM:")[1].split()[0]) / 1024)
    return found


if __name__ == "__main__":
    if "--linked" in sys.argv:
        os.fsync = lambda handle: None
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(simulate(Path(root), int(sys.argv[1]), "--linked" in sys.argv), indent=1))
