"""The training loop of every part of the embedded base, and the images of its training set."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from critters_lessons import neighbour
from diffusers.training_utils import EMAModel

from imagic_lora.critters import SIZE, render, scene_at


def drawn(index: int) -> np.ndarray:
    """Training image number ``index``; the name of this function is part of a file name."""
    return np.asarray(render(scene_at("train", index)))


def drawn_neighbour(index: int) -> np.ndarray:
    """Training image number ``index`` of the U-Net; the name of this function is part of a file name."""
    return np.asarray(render(neighbour(index)))


def pictures(work: Path, count: int, draw: Callable[[int], np.ndarray] = drawn) -> np.ndarray:
    """The first ``count`` training images, ``[count, 64, 64, 3]`` uint8; rendered once and cached in a file.

    Args:
        work: folder of the file.
        draw: renders the image of an index; its name is part of the file name.
    """
    path = work / f"{draw.__name__}-{count}.npy"
    if not path.exists():
        array = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.uint8, (count, SIZE, SIZE, 3))
        with Pool() as pool:
            for k, image in enumerate(pool.imap(draw, range(count), chunksize=256)):
                array[k] = image
        array.flush()
        path.with_suffix(".part").rename(path)
    return np.load(path, mmap_mode="r")


class Run:
    """One training run: loop, learning rate schedule, exponential moving average of the weights, saved state; resumes from that state.

    Args:
        args: the command's arguments: ``work``, ``part``, ``device``, ``steps``, ``seed``.
        module: the module to train.
        lr: peak learning rate. It rises linearly over 200 steps and then falls as a cosine to 2%.
        held: share of the steps before the cosine begins, in [0, 1).
    """

    def __init__(self, args: argparse.Namespace, module: torch.nn.Module, lr: float, held: float = 0.0) -> None:
        self.args, self.module, self.held = args, module.to(args.device), held
        self.path = args.work / f"{args.part}.pt"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.ema = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.ema.to(args.device)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]

    def _rate(self, step: int) -> float:
        """The learning rate of a step, as a factor of the peak."""
        done = min(1.0, max(0.0, step / self.args.steps - self.held) / (1 - self.held))
        return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))

    def save(self) -> None:
        """Writes the state of module, optimizer, schedule and average atomically."""
        parts = {"module": self.module, "optimizer": self.optimizer, "schedule": self.schedule, "ema": self.ema}
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)

    def train(self, loss_of: Callable[[np.random.Generator], torch.Tensor]) -> Iterator[int]:
        """Trains until ``args.steps``, logs every 100 steps and saves every two minutes.

        Args:
            loss_of: the loss of one step. Its generator and PyTorch's global one are seeded from ``(seed, step)``.

        Yields:
            The number of steps done, after each step.
        """
        saved = logged = time.time()
        sums: list[torch.Tensor] = []
        for step in range(self.step, self.args.steps):
            torch.manual_seed(self.args.seed * 1_000_003 + step)
            rng = np.random.default_rng((self.args.seed, step))
            with torch.autocast(self.args.device, torch.bfloat16):
                loss = loss_of(rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.step(self.module.parameters())
            self.step = step + 1
            sums.append(loss.detach())
            if self.step % 100 == 0:
                now = time.time()
                line = {"step": self.step, "loss": round(torch.stack(sums).mean().item(), 5), "s": round((now - logged) / 100, 3)}
                with (self.args.work / f"{self.args.part}.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                logged, sums = now, []
            if time.time() - saved > 120:
                self.save()
                saved = time.time()
            yield self.step
        self.save()

    def averaged(self) -> torch.nn.Module:
        """The module with the averaged weights, in evaluation mode; they overwrite the trained ones."""
        self.ema.copy_to(self.module.parameters())
        return self.module.eval()
