"""Speed of both stages and of generation, and what the memory levers cost.

``python scripts/bench_speed.py`` writes docs/internals/speed.md.

The package's loop is compared with a plain loop that does what a one-file script does: the same model, size, batch and precision, PyTorch's
own Adam, independent timesteps, noise from the global generator, the loss read at every step. Both run alternately in one process; the
figures are medians of the rounds, and the median of their ratios. On a CPU: the embedded base, and Stable Diffusion 1.5 at true width with
random weights and small latents. On a card: 512 pixels, batch 1, 4 and 8, and PyTorch's compiler and channels_last compared with the plain
model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from measuring import opened, settings, table
from PIL import Image
from torch.nn import Parameter
from torch.profiler import profile

from imagic_lora.adapters.modes import MODES
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EditConfig, Mode, RunConfig
from imagic_lora.core.runtime import Processes, peak_memory
from imagic_lora.memory.plan import assume
from imagic_lora.memory.prediction import predict
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.sampling.generate import generate
from imagic_lora.training.embed import embed_stage
from imagic_lora.training.stage import Stage
from imagic_lora.training.tune import tune_stage

PAGE = Path("docs/internals/speed.md")
Step = Callable[[], Any]
Cells = tuple[object, ...]
STAGES = ("base", "size", "stage", "batch", "optimizer", "ours, steps/s", "plain, steps/s", "ratio")
IMAGES = ("base", "size", "what", "ours, images/s", "plain, images/s", "ratio")
LEVERS: list[tuple[str, Mode, dict[str, Any], dict[str, Any]]] = [
    ("gradient checkpointing", "lora", {}, {"gradient_checkpointing": True}),
    ("NF4 base", "lora", {}, {"quantize": "nf4"}),
    ("8-bit Adam", "full", {"optimizer": "adam"}, {"optimizer": "adam8bit"}),
    ("optimizer in backward", "full", {"optimizer": "adam8bit"}, {"optimizer": "adam8bit", "optimizer_in_backward": True}),
    ("gradient checkpointing", "full", {}, {"gradient_checkpointing": True}),
    (
        "bf16 weights, stochastic rounding",
        "full",
        {"optimizer": "adam8bit", "dtype": "bf16"},
        {"optimizer": "adam8bit", "dtype": "bf16", "master_weights": "bf16-stochastic"},
    ),
    (
        "autocast without its cache",
        "full",
        {"optimizer": "adam8bit", "dtype": "bf16", "autocast_cache": True},
        {"optimizer": "adam8bit", "dtype": "bf16"},
    ),
]


class Bench:
    """A base with random latents and a random embedding in place of a photo and a prompt.

    Args:
        side: of the image, in pixels.
    """

    def __init__(self, base: Base, side: int) -> None:
        self.base, self.device = base, base.runtime.device
        architecture = base.architecture
        shape = (1, architecture.denoiser["in_channels"], side // architecture.vae_scale_factor, side // architecture.vae_scale_factor)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.text = Conditioning(
            torch.randn(architecture.conditioning["tokens"], generator=torch.Generator().manual_seed(1)).to(self.device)
        )

    def plain(self, parameters: list[Parameter], text: Conditioning, optimizer: torch.optim.Optimizer, batch: int) -> Step:
        """One step of a plain training loop on these parameters."""
        base, latents = self.base, self.latents

        def step() -> None:
            noise = torch.randn(batch, *latents.shape[1:], device=self.device)
            timesteps = torch.randint(0, base.architecture.scheduler["num_train_timesteps"], (batch,), device=self.device)
            predicted = base.predict(base.noised(latents.expand_as(noise), noise, timesteps), timesteps, text)
            F.mse_loss(predicted.float(), noise).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    @contextmanager
    def stage(self, name: str, run: RunConfig) -> Iterator[tuple[Stage, list[Parameter], Conditioning]]:
        """A stage of the package, with parameters and conditioning for a plain loop over the same."""
        if name == "embed":
            tokens = Parameter(self.text.tokens.clone())
            yield embed_stage(self.base, self.latents, self.text, run.embed, 0, Processes()), [tokens], Conditioning(tokens)
            return
        with MODES[run.tune.mode].trainables(self.base, run.tune, 0, False) as trainables:
            yield tune_stage(self.base, self.latents, self.text, trainables, run.tune, 0, Processes()), list(trainables.values()), self.text


def ours(stage: Stage) -> Step:
    """One step of the package's driver loop, with its check for finite values at the same interval."""
    every, counter = (10 if stage.latents.device.type == "cuda" else 1), iter(range(10**9))

    def step() -> None:
        report = stage.step(next(counter))
        if report.step % every == 0:
            stage.check()

    return step


def synchronised(step: Step) -> Step:
    """A plain step that waits for the device, as a step does that reads its loss."""

    def synchronised_step() -> None:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return synchronised_step


def plain_optimizer(name: str, parameters: list[Parameter], rate: float) -> torch.optim.Optimizer:
    """The optimizer of a plain script: PyTorch's Adam, or bitsandbytes' 8-bit Adam."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate)
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, lr=rate)


def seconds(step: Step, steps: int) -> float:
    """Mean seconds of a step, over a number of steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare(first: Step, second: Step, rounds: int, steps: int) -> tuple[float, float, float]:
    """Median seconds of each step, and the median of second / first; the two alternate, and so does the order within a round."""
    for step in (first, second):
        seconds(step, 1)
    pairs = []
    for k in range(rounds):
        if k % 2:
            seconds_of_second = seconds(second, steps)
            pairs.append((seconds(first, steps), seconds_of_second))
        else:
            pairs.append((seconds(first, steps), seconds(second, steps)))
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return a, b, statistics.median(second / first for first, second in pairs)


def stage_rows(base: str, side: int, rounds: int, steps: int, memory: dict[str, Any], batch: int | None = None) -> Iterator[Cells]:
    """Steps per second of both stages, by the package and by the plain loop."""
    kinds: tuple[tuple[str, Mode], ...] = (("embed", "lora"), ("tune", "lora"), ("tune", "full"))
    for name, mode in kinds:
        sizes = {"embed": {"batch_size": batch}, "tune": {"batch_size": batch}} if batch else {}
        run = settings(base, mode, "auto", {"memory": memory}, sizes)
        bench = Bench(opened(run), side)
        with bench.stage(name, run) as (stage, parameters, text):
            plain = plain_optimizer(bench.base.runtime.optimizer, parameters, stage.config.learning_rate)
            loop = synchronised(bench.plain(parameters, text, plain, stage.config.batch_size))
            a, b, ratio = compare(ours(stage), loop, rounds, steps)
        label = name if name == "embed" else f"tune, {mode}"
        yield base, f"{side} px", label, stage.config.batch_size, bench.base.runtime.optimizer, 1 / a, 1 / b, f"**{ratio:.3f}**"
        del bench, stage, parameters, loop, plain


def generation_row(base: str, side: int, rounds: int, sampler_steps: int) -> Cells:
    """Images per second, by the package and by diffusers' pipeline alone."""
    bench = Bench(opened(settings(base, "lora", "auto")), side)
    canvas = to_canvas(Image.new("RGB", (side, side), "grey"), side, bench.base.size_multiple)
    config = EditConfig(steps=sampler_steps, guidance_scale=3.0, batch_size=2)
    pipe: Any = bench.base.pipeline("text2image")

    def plain() -> None:
        tokens = bench.text.tokens.to(bench.base.runtime.dtype)
        pipe(
            prompt_embeds=torch.cat([tokens, tokens]), negative_prompt_embeds=torch.cat([tokens, tokens]), guidance_scale=3.0,
            num_inference_steps=sampler_steps, height=side, width=side, generator=[torch.Generator().manual_seed(k) for k in (0, 1)],
        )  # fmt: skip

    a, b, ratio = compare(
        lambda: list(generate(bench.base, [bench.text] * 2, [0, 1], config, canvas, bench.text, [bench.text])), plain, rounds, 1
    )
    return base, f"{side} px", f"two pictures, {sampler_steps} steps", 2 / a, 2 / b, f"**{ratio:.3f}**"


def lever_rows(base: str, side: int, rounds: int, steps: int) -> Iterator[Cells]:
    """Time of a tuning step with each lever divided by the time without, and the memory that the lever saves at SD 1.5's true size."""
    for name, mode, without, lever in LEVERS:
        pair = [settings(base, mode, "auto", {"memory": memory}) for memory in (lever, without)]
        benches = [Bench(opened(run), side) for run in pair]
        with benches[0].stage("tune", pair[0]) as (first, _, _), benches[1].stage("tune", pair[1]) as (second, _, _):
            a, b, _ = compare(ours(first), ours(second), rounds, steps)
            card = [settings("sd15", mode, "auto", {"memory": memory}) for memory in (lever, without)]
            sizes = [predict(architecture("sd15"), run, assume(run)).stages["tune"].total for run in card]
        yield name, mode, f"{(sizes[1] - sizes[0]) / 2**20:,.0f}", f"{a / b:.2f}"


def profile_rows(base: str, side: int, steps: int) -> Iterator[Cells]:
    """The ten operations with the largest share of a tuning step's time."""
    run = settings(base, "lora", "auto")
    bench = Bench(opened(run), side)
    with bench.stage("tune", run) as (stage, _, _):
        step = ours(stage)
        seconds(step, 2)
        with profile() as profiler:
            seconds(step, steps)
    card = torch.cuda.is_available()
    total = sum(_own_time(event, card) for event in profiler.key_averages())
    top = sorted(profiler.key_averages(), key=lambda event: -_own_time(event, card))[:10]
    yield from ((f"`{event.key}`", event.count // steps, f"{_own_time(event, card) / total:.1%}") for event in top)


def _own_time(event: Any, card: bool) -> float:
    """Time of an operation without its children, in microseconds."""
    return event.self_device_time_total if card else event.self_cpu_time_total


def changed_rows(rounds: int, steps: int) -> Iterator[Cells]:
    """Stage embed of SD 1.5 at 512 pixels, compiled and in channels_last, compared with the plain model."""
    run = settings("sd15", "lora", "auto")
    for name in ("compiled", "channels_last"):
        first, second = Bench(opened(run), 512), Bench(opened(run), 512)
        unet: Any = first.base.denoiser
        if name == "compiled":
            unet.compile()
        else:
            unet.to(memory_format=torch.channels_last)
        with first.stage("embed", run) as (changed, _, _), second.stage("embed", run) as (before, _, _):
            a, b, ratio = compare(ours(changed), ours(before), rounds, steps)
        yield "sd15", "512 px", f"embed, {name}", 1 / a, 1 / b, f"**{ratio:.3f}**"


def on_a_card(rounds: int, steps: int) -> list[str]:
    """SD 1.5 at 512 pixels on a card: batch sizes, the compiler, channels_last; lines of the page."""
    batches = chain.from_iterable(stage_rows("sd15", 512, rounds, steps, {"gradient_checkpointing": True}, batch) for batch in (1, 4, 8))
    lines = ["", "## On the card", "", *table(STAGES, batches)]
    lines += ["", *table(("base", "size", "variant", "steps/s with", "steps/s without", "ratio"), changed_rows(rounds, steps))]
    return [*lines, "", *table(IMAGES, [generation_row("sd15", 512, rounds, 30)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of one round, on the embedded base")
    parser.add_argument("--side", type=int, default=128, help="image size of SD 1.5 on a CPU, in pixels")
    parser.add_argument(
        "--only-critters", action="store_true", help="only the embedded base, and write no file; SD 1.5 takes ten minutes and 16 GB"
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    stages = table(STAGES, stage_rows("critters", 64, args.rounds, args.steps, {}))
    peak = f"Peak host memory of the process after the embedded base's stages: {peak_memory(torch.device('cpu')) / 2**20:,.0f} MiB."
    print(peak)
    if args.only_critters:
        return
    stages += table(STAGES, stage_rows("sd15", args.side, args.rounds, 1, {"optimizer": "adam8bit"}))[2:]
    sizes = (("critters", 64, args.rounds, 10), ("sd15", args.side, 3, 4))
    images = table(IMAGES, (generation_row(*size) for size in sizes))
    levers = table(("lever", "mode", "saves in tune, MiB", "time"), lever_rows("critters", 64, args.rounds, args.steps))
    where = table(("operation", "calls a step", "share"), profile_rows("critters", 64, 5))
    nothing = ["", "No card was available: nothing here was measured on one."]
    card = on_a_card(args.rounds, args.steps) if torch.cuda.is_available() else nothing
    page = _page(stages, peak, images, levers, where, card)
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


def _page(stages: list[str], peak: str, images: list[str], levers: list[str], where: list[str], card: list[str]) -> list[str]:
    threads = torch.get_num_threads()
    text = f"""# Speed

Written by `make bench-speed`, on {threads} of the cores of a CPU unless stated otherwise.

## Compared with a plain loop

The plain loop does what a one-file script does: the same model, size, batch and precision, PyTorch's own Adam, independent timesteps,
noise from the global generator, the loss read at every step. Both run in one process, in alternation. The figures are medians, and the
median of the ratios, above 1 where imagic-lora is faster. SD 1.5 has its true width, random weights and small latents.

TABLE

{peak}

PICTURES

## What the memory levers cost

Time of a tuning step with the lever divided by the time without it, on the embedded base on this CPU. A card will differ, most of all with
an optimizer in backward, which synchronises at every weight. The third column is what the lever alone saves in stage tune of SD 1.5 at
512 x 512, predicted, compared with no other lever; the [memory model](memory-model.md#what-each-lever-saves) adds the levers one after the
other.

LEVERS

## Where the time goes

PyTorch's profiler, stage tune, mode lora, embedded base.

WHERE"""
    parts = {"TABLE": stages, "PICTURES": images, "LEVERS": levers, "WHERE": where}
    return [line for name in text.split("\n") for line in parts.get(name, [name])] + card


if __name__ == "__main__":
    main()
