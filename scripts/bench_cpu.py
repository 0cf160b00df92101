"""Steps a second of both stages against a plain loop, on the embedded base: ``python scripts/bench_cpu.py``.

The plain loop is what a one-file script does: torch's Adam, independent timesteps, noise from the global generator, the loss read at every
step. Both run in one process, in alternation; medians of the rounds and their ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.bases.base import Base
from imagic_lora.conditioning import Conditioning
from imagic_lora.config import PRESETS, RunConfig, resolve
from imagic_lora.critters import render, scene_at
from imagic_lora.full import unfrozen
from imagic_lora.images import to_pixels
from imagic_lora.imagic import open_for
from imagic_lora.lora import attached
from imagic_lora.runtime import Processes, peak_memory
from imagic_lora.stages.embed import embed_stage
from imagic_lora.stages.stage import Stage
from imagic_lora.stages.tune import tune_stage


def plain(base: Base, latents: Tensor, text: Conditioning, parameters: list[Parameter], rate: float, batch: int) -> Callable[[], None]:
    """One step of a plain training loop over the same parameters."""
    optimizer = torch.optim.Adam(parameters, lr=rate)

    def step() -> None:
        noise = torch.randn(batch, *latents.shape[1:])
        timesteps = torch.randint(0, base.training.config.num_train_timesteps, (batch,))
        clean = latents.expand_as(noise)
        predicted = base.predict(base.training.add_noise(clean, noise, timesteps), timesteps, text)
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def ours(stage: Stage) -> Callable[[], None]:
    """One step of our driver loop."""
    counter = iter(range(10**9))

    def step() -> None:
        stage.step(next(counter))
        stage.check()

    return step


def seconds(step: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def compare(name: str, first: Callable[[], None], second: Callable[[], None], rounds: int, steps: int) -> None:
    """Prints the median seconds a step of ours and of the plain loop, alternating, and the ratio plain / ours."""
    for step in (first, second):
        seconds(step, 2)
    pairs = [(seconds(first, steps), seconds(second, steps)) for _ in range(rounds)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    print(f"{name:12} ours {1000 * a:7.1f} ms   plain {1000 * b:7.1f} ms   speed ratio {ratio:.3f}", flush=True)


def config_for(mode: str) -> RunConfig:
    return resolve({"base": "critters", "tune": {"mode": mode}}, {}, PRESETS["critters"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of one round")
    args = parser.parse_args()
    logging.disable_progress_bar()
    config = config_for("lora")
    base, one = open_for(config), Processes()
    latents = base.encode_image(to_pixels(render(scene_at("choose", 0))))
    target = base.encode_text("a dog jumping")
    embed = embed_stage(base, latents, target, config.embed, 0, one)
    tokens = Parameter(target.tokens.clone())
    loop = plain(base, latents, Conditioning(tokens), [tokens], config.embed.learning_rate, config.embed.batch_size)
    compare("embed", ours(embed), loop, args.rounds, args.steps)
    for mode in ("lora", "full"):
        tune = config_for(mode).tune
        with attached(base, tune, 0) if mode == "lora" else unfrozen(base) as parameters:
            stage = tune_stage(base, latents, target, parameters, tune, 0, one)
            loop = plain(base, latents, target, list(parameters.values()), tune.learning_rate, tune.batch_size)
            compare(f"tune {mode}", ours(stage), loop, args.rounds, args.steps)
    print(f"peak memory of the process: {peak_memory(base.runtime.device) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
