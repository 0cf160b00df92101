"""What every part of the embedded base is trained with: the training loop, the training images and the tokenizer."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTokenizer

from imagic_lora.critters import SIZE, render, sample_caption, scene_at

SAVE_SECONDS = 120
WARMUP = 200  # steps


@dataclass(frozen=True)
class Settings:
    """Where and from what a base is trained.

    Args:
        work: folder of the training images, the states and the logs.
        seed: seed of the initial weights and of everything that a step draws.
        pictures: number of images in the training set.
        device: ``cpu`` or ``cuda``.
        base: folder of the base whose VAE, tokenizer and text encoder are used; None for the one that is made.
    """

    work: Path
    seed: int
    pictures: int
    device: str
    base: Path | None = None

    @property
    def out(self) -> Path:
        """Folder of the finished base, with the layout of ``imagic_lora/critters/data``."""
        return self.work / "data"

    @property
    def parts(self) -> Path:
        """Folder of the finished VAE, tokenizer and text encoder."""
        return self.base or self.out


def drawn(index: int) -> np.ndarray:
    """Training image number ``index``, ``[64, 64, 3]`` uint8."""
    return np.asarray(render(scene_at("train", index)))


def pictures(settings: Settings) -> np.ndarray:
    """The training images, ``[pictures, 64, 64, 3]`` uint8; rendered once and cached in a file."""
    path = settings.work / f"pictures-{settings.pictures}.npy"
    if not path.exists():
        array = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.uint8, (settings.pictures, SIZE, SIZE, 3))
        with Pool() as pool:
            images = pool.imap(drawn, range(settings.pictures), chunksize=256)
            for k, image in enumerate(tqdm(images, "render", settings.pictures, unit="images")):
                array[k] = image
        array.flush()
        path.with_suffix(".part").rename(path)
    return np.load(path, mmap_mode="r")


def tensor(batch: np.ndarray, device: str) -> torch.Tensor:
    """Images as ``[B, 3, 64, 64]`` in [-1, 1]."""
    return torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device).float().div(127.5).sub(1)


def tokenizer(out: Path) -> CLIPTokenizer:
    """The byte-pair tokenizer of a base; it is trained on captions if the folder has none.

    Words that occur in no caption are split into letters, so every prompt can be encoded.
    """
    path = out / "tokenizer"
    if not path.exists():
        rng = random.Random(0)
        bpe = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator((sample_caption(scene_at("train", k), rng) for k in range(5000)), trainer)
        model = json.loads(bpe.to_str())["model"]
        words = [*sorted(alphabet), *(f"{c}</w>" for c in sorted(alphabet)), *("".join(m) for m in model["merges"])]
        words += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {word: k for k, word in enumerate(dict.fromkeys(words))}
        merges: Any = [tuple(m) for m in model["merges"]]
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def tokens(words: CLIPTokenizer, texts: list[str], device: torch.device | str) -> torch.Tensor:
    """Token ids of texts, padded to the tokenizer's maximum length, ``[B, T]``."""
    return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to a matrix, about: all singular values between 0.68 and 1.14.

    Five Newton-Schulz iterations with the coefficients of Muon, on the Gram matrix: it is the smaller one, and all factors commute.
    """
    x = update if update.shape[0] <= update.shape[1] else update.T
    x = x / (x.norm() + 1e-7)
    gram, identity = x @ x.T, torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x if update.shape[0] <= update.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan 2024) with Nesterov momentum of 0.95, and updates scaled to the size of Adam's (arXiv 2502.16982).

    Args:
        parameters: weights of linear layers and convolutions; a convolution counts as a matrix of its outputs.
        lr: learning rate, in Adam's range.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # without a closure
        """Updates every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                update = parameter.grad.lerp(momentum, 0.95).flatten(1)
                scale = 0.2 * math.sqrt(max(update.shape))
                parameter.add_(orthogonalised(update).view_as(parameter), alpha=-group["lr"] * scale)


def is_hidden(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon may train a parameter: a matrix or convolution that is neither an embedding nor the first or last layer."""
    others = ("embed", "conv_in", "conv_out", "quant_conv", "norm_out")
    return parameter.ndim >= 2 and not any(part in name for part in others) and name != "proj_out.weight"  # of a transformer


class Run:
    """The training of one part: loop, learning rate schedule, moving average of the weights, saved state; resumes from that state.

    Args:
        settings: where and from what.
        part: name of the part; the state is saved as ``PART.pt`` in ``settings.work``, the log as ``PART.jsonl``.
        module: the module to train.
        steps: number of steps.
        lr: peak learning rate of AdamW. It rises linearly over 200 steps and falls as a cosine to 2%.
        muon: peak learning rate of Muon, which trains the hidden matrices and convolutions; None: AdamW trains all.
        held: share of the steps before the cosine begins, in [0, 1).
    """

    def __init__(
        self, settings: Settings, part: str, module: torch.nn.Module, steps: int, lr: float, muon: float | None = None, held: float = 0.0
    ) -> None:
        self.settings, self.part, self.module, self.steps, self.held = settings, part, module.to(settings.device), steps, held
        self.path = settings.work / f"{part}.pt"
        hidden = [parameter for name, parameter in module.named_parameters() if muon is not None and is_hidden(name, parameter)]
        others = [parameter for name, parameter in module.named_parameters() if muon is None or not is_hidden(name, parameter)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
        self.optimizers += [Muon(hidden, muon)] if muon is not None else []
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate) for optimizer in self.optimizers]
        self.ema = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.ema.to(settings.device)
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location=settings.device, weights_only=True)
            module.load_state_dict(state["module"])
            for name in ("optimizers", "schedules"):
                for one, saved in zip(getattr(self, name), state[name], strict=True):
                    one.load_state_dict(saved)
            self.ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]

    def _rate(self, step: int) -> float:
        """The learning rate of a step, as a factor of the peak."""
        done = min(1.0, max(0.0, step / self.steps - self.held) / (1 - self.held))
        return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))

    def save(self) -> None:
        """Writes the state of module, optimizers, schedules and average atomically."""
        state: dict[str, Any] = {"module": self.module.state_dict(), "ema": self.ema.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"schedules": [schedule.state_dict() for schedule in self.schedules], "step": self.step, "seconds": self.seconds}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)

    def train(self, loss_of: Callable[[np.random.Generator], torch.Tensor]) -> Iterator[int]:
        """Trains to the last step, logs every 100 steps and saves every two minutes and at the end.

        Args:
            loss_of: the loss of one step. Its generator and PyTorch's global one are seeded from ``(seed, step)``.

        Yields:
            The number of steps done, after each step.
        """
        begun, before, saved = time.time(), self.seconds, time.time()
        sums: list[torch.Tensor] = []
        for step in tqdm(range(self.step, self.steps), self.part, self.steps, initial=self.step, unit="steps", mininterval=5):
            torch.manual_seed(self.settings.seed * 1_000_003 + step)
            rng = np.random.default_rng((self.settings.seed, step))
            with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.device == "cuda"):
                loss = loss_of(rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            self.ema.step(self.module.parameters())
            sums.append(loss.detach())
            self.step, self.seconds = step + 1, before + time.time() - begun
            if self.step % 100 == 0:
                line = {"step": self.step, "loss": round(torch.stack(sums).mean().item(), 5), "seconds": round(self.seconds)}
                with (self.settings.work / f"{self.part}.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                sums = []
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            yield self.step
        self.save()

    def averaged(self) -> torch.nn.Module:
        """The module with the averaged weights, in evaluation mode; they overwrite the trained ones."""
        self.ema.copy_to(self.module.parameters())
        return self.module.eval()
