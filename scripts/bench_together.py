"""Photos per hour of fits that share each pass of the denoiser against one after the other: ``python scripts/bench_together.py``.

Both ways fit the same photos with the same settings on one loaded base, in turn, so that what else the machine does meets both. Times are
those of the process on the processor, which other programs disturb less than the clock. ``--base sd15`` takes Stable Diffusion 1.5 at its
true width with random weights, in fp32, and images of 64 pixels. ``--profile`` prints where the time of one group goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from diffusers.utils import logging

from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.config import RunConfig
from imagic_lora.core.runtime import peak_memory, resolve_runtime
from imagic_lora.core.settings.merging import merged
from imagic_lora.critters import caption, render, scene_at
from imagic_lora.training.configure import configure
from imagic_lora.training.fit import fit, open_base
from imagic_lora.training.grouping import Item
from imagic_lora.training.rehearsing.random_base import random_base
from imagic_lora.training.together import fit_together

SIZES = {"critters": {}, "sd15": {"resolution": 64}}


def opened(name: str, share: float) -> tuple[RunConfig, Base]:
    """A base, and its recipe, of whose steps a share is done."""
    given = {"base": name, **SIZES[name], "memory": {"device": "cpu", "dtype": "fp32"}}
    full = configure(given)
    steps = {stage: {"steps": max(1, round(share * getattr(full, stage).steps))} for stage in ("embed", "tune", "edit")}
    config = configure(merged(given, steps))
    if name == "critters":
        return config, open_base(config)
    return config, random_base(PUBLISHED[name], config, resolve_runtime(config.memory))


def measure(items: Sequence[Item], config: RunConfig, base: Base, together: bool) -> tuple[float, float, dict[str, float]]:
    """Processor seconds and seconds of the clock that the fits take, and processor seconds by stage."""
    with tempfile.TemporaryDirectory() as folder:
        store, start, clock, stages = Store(Path(folder)), time.process_time(), time.perf_counter(), dict[str, float]()
        last = start

        def stepped(stage: str) -> None:
            nonlocal last
            now = time.process_time()
            stages[stage], last = stages.get(stage, 0.0) + now - last, now

        if together:
            for report in fit_together(items, config, store, base=base):
                if report.error:
                    raise report.error
                stepped(report.step.stage if report.step else "preview and store")
        else:
            for item in items:
                own = config.model_copy(update={"seed": item.seed})
                for report in fit(item.photo, item.prompt, own, store, item.name, base=base):
                    stepped(report.stage)
                stepped("preview and store")
        return time.process_time() - start, time.perf_counter() - clock, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SIZES, default="critters")
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.2, help="share of the steps of the recipe of the base")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hide_progress_bars()
    config, base = opened(args.base, args.share)
    with tempfile.TemporaryDirectory() as folder:
        items: list[Item] = []
        for k in range(args.photos):
            scene, path = scene_at("heldout", k), Path(folder) / f"{k}.png"
            render(scene).save(path)
            items.append(Item(path, caption(scene), f"photo-{k}", seed=k))
        measure(items[:2], config, base, True)
        if args.profile:
            with cProfile.Profile() as profile:
                measure(items, config, base, True)
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            return
        ratios: list[float] = []
        for pair in range(args.pairs):
            order = (True, False) if pair % 2 else (False, True)
            found = {together: measure(items, config, base, together) for together in order}
            ratios.append(found[False][0] / found[True][0])
            for together, (seconds, clock, stages) in found.items():
                parts = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
                way = f"{args.photos} together" if together else "one by one"
                hourly = f"{3600 * args.photos / seconds:7.0f} photos an hour of processor time"
                print(f"{way:12} {hourly}; {seconds:6.1f} s ({parts}), clock {clock:.1f} s")
            print(f"ratio {ratios[-1]:.2f}, of the clock {found[False][1] / found[True][1]:.2f}", flush=True)
    threads, peak = torch.get_num_threads(), peak_memory(torch.device("cpu")) / 2**30
    print(f"{args.base}, median ratio {median(ratios):.2f} of {args.pairs} pairs, {threads} threads, peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
