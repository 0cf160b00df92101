"""Settings of Imagic on many cases of CritterBench at once: ``python scripts/sweep_critters.py --cases 100 --etas 0.6 0.8``.

All cases are fitted as one batch. Each sample has its own embedding and LoRA layers, with the noise, the timesteps and the initial weights
that the benchmark uses, so the images equal those of the benchmark up to rounding. Use it to choose settings, with a seed other than that
of the reported results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.lora import attached
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Score, Scorer
from imagic_lora.core.conditioning import Conditioning, concatenate, interpolate, source_conditionings
from imagic_lora.core.config import EditConfig, EmbedConfig, RunConfig, TuneConfig
from imagic_lora.core.noise import key, noise_at, times_at
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.critters.judge import Judge
from imagic_lora.photos.canvas import to_image, to_pixels
from imagic_lora.sampling.inversion import NoiseRecorder, NoiseReplayer
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.optimizers import build_optimizer

SHARES = ("success", "attributes", "aligned")


def own_layers(base: Base, config: TuneConfig, cases: Sequence[Case]) -> dict[str, Parameter]:
    """LoRA layers of every case by name, ``[cases, ...]``, initialised by :func:`imagic_lora.adapters.lora.attached`."""
    initial: list[dict[str, Tensor]] = []
    for case in cases:
        with attached(base, config, key(case.index, "lora")) as layers:
            initial.append({name: layer.detach().clone() for name, layer in layers.items()})
    return {name: Parameter(torch.stack([layers[name] for layers in initial])) for name in initial[0]}


@contextmanager
def applied(base: Base, layers: dict[str, Parameter], scale: float) -> Iterator[None]:
    """Adds LoRA layers to the denoiser, one set per sample; a batch of ``n * cases`` samples repeats the sets ``n`` times."""
    modules: dict[str, Any] = dict(base.denoiser.named_modules())
    names = sorted({name.split(".lora_")[0] for name in layers})
    hooks = []
    for name in names:
        down, up = (next(value for key, value in layers.items() if key.startswith(f"{name}.lora_{part}.")) for part in "AB")
        hooks.append(modules[name].register_forward_hook(_added(down, up, scale)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _added(down: Tensor, up: Tensor, scale: float) -> Any:
    """A forward hook that adds ``scale * up(down(x))`` to a linear layer or a convolution."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs[:1]
        repeats = len(x) // len(down)
        a, b = (layer.flatten(2).repeat(repeats, 1, 1) for layer in (down, up))
        if isinstance(module, torch.nn.Linear):
            return output + scale * (x @ a.mT @ b.mT)
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        return output + scale * (b @ (a @ columns)).view_as(output)

    return hook


def train(
    base: Base,
    latents: Tensor,
    conditioning: Conditioning,
    trainables: Sequence[Parameter],
    stage: Literal["embed", "tune"],
    config: EmbedConfig | TuneConfig,
    cases: Sequence[Case],
) -> None:
    """Trains one stage of all cases together. Adam is element-wise, so the cases do not influence each other."""
    optimizer = build_optimizer("adam", trainables, config.learning_rate)
    samples = range(config.batch_size)
    for step in range(config.steps):
        noise = torch.stack([noise_at(case.index, stage, step, samples, tuple(latents.shape[1:])) for case in cases])
        times = torch.stack([times_at(case.index, stage, step, samples, config.batch_size, config.timesteps) for case in cases])
        for sample in samples:
            loss = denoising_loss(base, latents, conditioning, noise[:, sample], times[:, sample]).sum() / config.batch_size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def edited(
    base: Base, latents: Tensor, conditioning: Conditioning, source: Conditioning, config: EditConfig, cases: Sequence[Case]
) -> Tensor:
    """Latents of the edits of all cases, started from edit-friendly inversion of the photos or from noise."""
    path: Any = NoiseRecorder.from_config(base.scheduler().config)
    path.set_timesteps(config.steps)
    draws = torch.stack([torch.randn(config.steps, *latents.shape[1:], generator=torch.Generator().manual_seed(c.index)) for c in cases], 1)
    if config.start == "inverted":
        path.path = torch.stack([*(path.add_noise(latents, draw, t[None]) for draw, t in zip(draws, path.timesteps, strict=True)), latents])
        path.added = []
        for x, t in zip(path.path, path.timesteps, strict=False):
            path.step(base.predict(x, t.expand(len(x)), source), t, x, eta=config.ddim_eta)
    back: Any = NoiseReplayer.from_config(path.config)
    back.set_timesteps(config.steps)
    back.added = path.added if config.start == "inverted" else [torch.zeros_like(latents)] * config.steps
    x, null = path.path[0] if config.start == "inverted" else draws[0], base.null()
    for t in back.timesteps:
        predicted = base.predict(x, t.expand(len(x)), conditioning)
        if config.guidance_scale > 1 and null is not None:
            plain = base.predict(x, t.expand(len(x)), null)
            predicted = plain + config.guidance_scale * (predicted - plain)
        (x,) = back.step(predicted, t, x, eta=config.ddim_eta)
    return x


def sweep(base: Base, scorer: Scorer, cases: Sequence[Case], config: RunConfig, edits: Sequence[tuple[float, float]]) -> None:
    """Fits all cases with one configuration and prints a line for each pair of eta and guidance scale."""
    latents = torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])
    target = concatenate([base.encode_prompt(case.prompt) for case in cases])
    tokens = Parameter(target.tokens.clone())
    optimised = Conditioning(tokens)
    train(base, latents, optimised, [tokens], "embed", config.embed, cases)
    optimised = Conditioning(tokens.detach())
    layers = own_layers(base, config.tune, cases)
    with applied(base, layers, 1.0 if config.tune.alpha is None else config.tune.alpha / config.tune.rank):
        train(base, latents, optimised, list(layers.values()), "tune", config.tune, cases)
        for eta, guidance in edits:
            sampling = config.edit.model_copy(update={"guidance_scale": guidance})
            (source,) = source_conditionings(target, optimised, [eta], sampling.source_eta)
            images = base.decode(edited(base, latents, interpolate(target, optimised, eta), source, sampling, cases))
            show(
                f"eta {eta:g}, guidance {guidance:g}",
                cases,
                [scorer.score(case, to_image(image)) for case, image in zip(cases, images, strict=True)],
            )


def show(title: str, cases: Sequence[Case], scores: Sequence[Score]) -> None:
    """Prints one line: success / attributes / aligned in %, and PSNR, for pose edits and for all others."""
    print(f"{title:28}", end="")
    for kind in ("pose", "others"):
        selected = [score for case, score in zip(cases, scores, strict=True) if (case.kind == "pose") == (kind == "pose")]
        if selected:
            shares = " / ".join(f"{100 * sum(getattr(score, name) for score in selected) / len(selected):3.0f}" for name in SHARES)
            print(f"{kind}: {shares}   PSNR {sum(score.psnr for score in selected) / len(selected):.1f} dB   ", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = defaults("lora")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases; the reported results use 7")
    for stage, config in (("embed", usual.embed), ("tune", usual.tune)):
        parser.add_argument(f"--{stage}", nargs=2, metavar=("STEPS", "RATE"), default=(config.steps, config.learning_rate))
    parser.add_argument("--etas", type=float, nargs="+", default=[usual.eta])
    parser.add_argument("--guidance", type=float, nargs="+", default=[usual.edit.guidance_scale])
    parser.add_argument("--source-eta", type=float, default=usual.edit.source_eta)
    parser.add_argument("--start", choices=("inverted", "noise"), default=usual.edit.start)
    args = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    pace = {stage: {"steps": int(getattr(args, stage)[0]), "learning_rate": float(getattr(args, stage)[1])} for stage in ("embed", "tune")}
    sampling = {"start": args.start, "source_eta": args.source_eta}
    config = defaults("lora", {**pace, "edit": sampling, "memory": {"device": "cpu", "dtype": "fp32", "optimizer": "adam"}})
    base = load_base("critters", resolve_runtime(config.memory))
    base.denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    scorer = Scorer(Judge.load(), CritterAlignment.load())
    cases = [case_at(args.seed, index) for index in range(args.cases)]
    sweep(base, scorer, cases, config, list(product(args.etas, args.guidance)))


if __name__ == "__main__":
    main()
