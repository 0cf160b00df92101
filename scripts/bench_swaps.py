"""Time to replace one LoRA adapter by another in an editor: ``python scripts/bench_swaps.py``.

On the CPU, in fp32: the embedded base with the two example adapters, and Stable Diffusion 1.5 at true size with random weights and two
random adapters of rank 16 on its attention. ``read`` is the time of the second adapter's first load, from disk; ``swap`` is that of every
later load.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging
from PIL import Image

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.contents import save_embeddings, weights_record
from imagic_lora.adapters.lora import attached, save_lora
from imagic_lora.adapters.record import SOURCE, BaseRecord, Record, SourceRecord
from imagic_lora.adapters.store import Store
from imagic_lora.bases.families.common import LatentBase
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.config import RunConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import peak_memory, resolve_runtime
from imagic_lora.photos.png import png
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.rehearsing.random_base import random_base, random_conditioning

EXAMPLES = Path(__file__).parent.parent / "adapters"
MEMORY = MemoryConfig(device="cpu", dtype="fp32")


def random_adapter(base: LatentBase, store: Store, name: str, run: RunConfig, seed: int) -> Adapter:
    """A stored adapter with random LoRA layers and embeddings and a blank photo, of the sizes that fit() gives."""
    side, generator = base.resolution, torch.Generator().manual_seed(seed)
    record = Record(
        name=name,
        created="",
        base=BaseRecord(name=base.name, revision=None, fingerprint=base.fingerprint),
        parts=[weights_record(base, "lora")],
        prompt="a dog",
        config=run,
        source=SourceRecord(sha256="0" * 64, size=(side, side), box=(0, 0, side, side)),
        losses={},
        seconds={},
        runtime={},
        peak_memory=0,
        versions={},
    )

    def fill(writer: AtomicWriter) -> None:
        with attached(base, run.tune, seed) as parameters, torch.no_grad():
            for value in parameters.values():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
            save_lora(base, writer)
        save_embeddings(writer, {kind: random_conditioning(base, side, side) for kind in ("target", "optimised", "null")})
        writer.write(SOURCE, [png(Image.new("RGB", (side, side)), {})])

    return store.write(record, fill)


def seconds(work: Callable[[], object]) -> float:
    """Duration of a call, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(editor: Editor, adapters: list[Adapter], count: int) -> tuple[float, list[float]]:
    """Seconds of the last adapter's first load, and of each of ``count`` swaps after it; the adapter is unloaded at the end."""
    first = [seconds(lambda: editor.load(adapter)) for adapter in adapters]  # noqa: B023  # called at once
    swaps = [seconds(lambda: editor.load(adapters[k % len(adapters)])) for k in range(count)]  # noqa: B023
    editor.close()
    return first[-1], swaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=200, help="number of swaps of each base")
    parser.add_argument("--base", choices=("critters", "sd15"), action="append", help="may be repeated; default: both")
    args = parser.parse_args()
    logging.disable_progress_bar()
    for name in args.base or ("critters", "sd15"):
        with tempfile.TemporaryDirectory() as folder:
            if name == "critters":
                base, store = load_base("critters", resolve_runtime(MEMORY)), Store(EXAMPLES)
                adapters = [store.read(stored) for stored in store.names()[:2]]
            else:
                run = RunConfig(base=name, memory=MEMORY)
                base, store = random_base(PUBLISHED[name], run, resolve_runtime(MEMORY)), Store(Path(folder))
                adapters = [random_adapter(base, store, f"random-{seed}", run, seed) for seed in (0, 1)]
            read, swaps = measured(Editor(base), adapters, args.swaps)
            size, peak = adapters[0].size / 1e6, peak_memory(base.runtime.device) / 2**30
        median, slowest = statistics.median(swaps) * 1e3, max(swaps) * 1e3
        print(f"{name}: swap {median:.1f} ms (median of {len(swaps)}, slowest {slowest:.1f}), read {read * 1e3:.0f} ms, ", end="")
        print(f"adapters of {size:.1f} MB, process at most {peak:.1f} GiB")


if __name__ == "__main__":
    main()
