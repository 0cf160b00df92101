"""Time and memory of a base at true size with random weights: ``python scripts/true_size.py --base sdxl``.

Runs one step of each stage and one sampler step on the CPU. Prints the time, the peak size of all tensors, and the predicted peak: of the
plan, which for flow transformers comes from a rehearsal. Neither time nor memory depends on the values of the weights.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers.utils import logging
from measuring import settings

from imagic_lora.adapters.modes import MODES
from imagic_lora.bases.families.common import LatentBase
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.runtime import Processes, resolve_runtime
from imagic_lora.memory.plan import assume, passes_per_step
from imagic_lora.memory.prediction import predict
from imagic_lora.memory.tracker import Tracker
from imagic_lora.training.embed import embed_stage
from imagic_lora.training.rehearsing.random_base import random_base, random_conditioning
from imagic_lora.training.rehearsing.rehearsal import rehearse
from imagic_lora.training.tune import tune_stage

LEVERS: dict[Mode, dict[str, object]] = {"lora": {}, "full": {"master_weights": "bf16-stochastic"}}


@contextmanager
def timed(name: str, tracker: Tracker, predicted: dict[str, int]) -> Iterator[None]:
    """Prints a table row: seconds and peak memory of the block, and the predicted peak in bytes."""
    gc.collect()
    tracker.reset_peak()
    start = time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - start, tracker.peak
    print(f"| {name} | {seconds:.1f} | {peak / 2**20:,.0f} | {predicted[name] / 2**20:,.0f} | {peak / predicted[name]:.3f} |", flush=True)


def one_step_each(base: LatentBase, run: RunConfig, side: int, tracker: Tracker, predicted: dict[str, int]) -> None:
    """Runs one step of every stage with the package's code and prints a row for each."""
    with timed("encode", tracker, predicted):
        latents = base.encode_image(torch.rand(1, 3, side, side) * 2 - 1)
    base.offload_encoders()
    text = random_conditioning(base, side, side)
    with timed("embed", tracker, predicted):
        stage = embed_stage(base, latents, text, run.embed, 0, Processes())
        stage.step(0)
        stage.check()
    del stage
    with MODES[run.tune.mode].trainables(base, run.tune, 0, False) as trainables:
        with timed("tune", tracker, predicted):
            stage = tune_stage(base, latents, text, trainables, run.tune, 0, Processes())
            stage.step(0)
            stage.check()
        del stage
        with torch.no_grad():
            if base.architecture.process == "diffusion":
                base.pipeline("text2image")
            with timed("sample", tracker, predicted):
                batch = run.edit.batch_size * passes_per_step(base.architecture, run)
                level = 500 if base.architecture.process == "diffusion" else 0.5
                base.predict(latents.expand(batch, -1, -1, -1), torch.full((batch,), level), text)
            with timed("decode", tracker, predicted):
                image = base.decode(latents)
    assert image.isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sdxl", choices=PUBLISHED)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--mode", choices=LEVERS, default="lora")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="fp32 where the CPU has no arithmetic in bf16")
    parser.add_argument(
        "--text-layers", type=int, help="layers of each text encoder, where host memory is short; their peak is not measured"
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    memory = {"device": "cpu", "dtype": args.dtype, "optimizer": "adam8bit", "quantize": "none", "quantize_text": "none"}
    memory |= LEVERS[args.mode]
    one_step = {"resolution": args.side, "memory": memory, "embed": {"steps": 1}, "tune": {"steps": 1}, "edit": {"batch_size": 1}}
    run = settings(args.base, args.mode, "8gb", one_step)
    architecture = PUBLISHED[args.base]
    if args.text_layers:
        cut = {"num_hidden_layers": args.text_layers, "num_layers": args.text_layers}
        texts = architecture.text_encoders.items()
        architecture = replace(
            architecture, text_encoders={part: text | {name: cut[name] for name in cut if name in text} for part, text in texts}
        )
    plan = predict if architecture.process == "diffusion" else rehearse
    predicted = {name: peak.total for name, peak in plan(architecture, run, assume(run, "cpu")).stages.items()}
    where = f"{args.dtype} on the CPU, {torch.get_num_threads()} threads"
    print(f"{args.base}, {args.mode}, {args.side} pixels, {where}, random weights\n", flush=True)
    print("| stage, one step | seconds | MiB of tensors | predicted | ratio |\n|" + "---|" * 5)
    with Tracker() as tracker:
        one_step_each(random_base(architecture, run, resolve_runtime(run.memory)), run, args.side, tracker, predicted)


if __name__ == "__main__":
    main()
