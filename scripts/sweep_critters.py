"""Settings of Imagic on many cases of CritterBench at once: ``python scripts/sweep_critters.py --cases 100 --etas 0.6 0.8``.

All cases are fitted as one batch in which each sample has an embedding and LoRA layers of its own, with the noise, the timesteps and the
first weights that the benchmark gives it: the same pictures but for rounding. For choosing settings, on a seed that is not that of the
claims.
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
    """LoRA layers of every case as :func:`imagic_lora.adapters.lora.attached` begins them, ``[cases, ...]`` by name."""
    begun: list[dict[str, Tensor]] = []
    for case in cases:
        with attached(base, config, key(case.index, "lora")) as layers:
            begun.append({name: layer.detach().clone() for name, layer in layers.items()})
    return {name: Parameter(torch.stack([one[name] for one in begun])) for name in begun[0]}


@contextmanager
def applied(base: Base, layers: dict[str, Parameter], scale: float) -> Iterator[None]:
    """The denoiser with layers of its own for every sample; a batch of twice as many goes through them twice, as guidance has it."""
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
    """A hook that adds ``scale * up(down(x))``, of linear layers and of convolutions."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs[:1]
        times = len(x) // len(down)
        a, b = (one.flatten(2).repeat(times, 1, 1) for one in (down, up))
        if isinstance(module, torch.nn.Linear):
            return output + scale * (x @ a.mT @ b.mT)
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        return output + scale * (b @ (a @ columns)).view_as(output)

    return hook


def train(
    base: Base,
    latents: Tensor,
    told: Conditioning,
    trainables: Sequence[Parameter],
    stage: Literal["embed", "tune"],
    config: EmbedConfig | TuneConfig,
    cases: Sequence[Case],
) -> None:
    """A stage of every case, step by step together; Adam goes by each element alone, so that no case knows of another."""
    optimizer = build_optimizer("adam", trainables, config.learning_rate)
    samples = range(config.batch_size)
    for step in range(config.steps):
        noise = torch.stack([noise_at(case.index, stage, step, samples, tuple(latents.shape[1:])) for case in cases])
        times = torch.stack([times_at(case.index, stage, step, samples, config.batch_size, config.timesteps) for case in cases])
        for sample in samples:
            loss = denoising_loss(base, latents, told, noise[:, sample], times[:, sample]).sum() / config.batch_size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def edited(base: Base, latents: Tensor, told: Conditioning, source: Conditioning, config: EditConfig, cases: Sequence[Case]) -> Tensor:
    """Latents of the edits of all cases: from the photos' edit-friendly noise, or from noise."""
    path: Any = NoiseRecorder.from_config(base.scheduler().config)
    path.set_timesteps(config.steps)
    draws = torch.stack([torch.randn(config.steps, *latents.shape[1:], generator=torch.Generator().manual_seed(c.index)) for c in cases], 1)
    if config.start == "inverted":
        path.path = torch.stack([*(path.add_noise(latents, one, t[None]) for one, t in zip(draws, path.timesteps, strict=True)), latents])
        path.added = []
        for x, t in zip(path.path, path.timesteps, strict=False):
            path.step(base.predict(x, t.expand(len(x)), source), t, x, eta=config.ddim_eta)
    back: Any = NoiseReplayer.from_config(path.config)
    back.set_timesteps(config.steps)
    back.added = path.added if config.start == "inverted" else [torch.zeros_like(latents)] * config.steps
    x, null = path.path[0] if config.start == "inverted" else draws[0], base.null()
    for t in back.timesteps:
        predicted = base.predict(x, t.expand(len(x)), told)
        if config.guidance_scale > 1 and null is not None:
            plain = base.predict(x, t.expand(len(x)), null)
            predicted = plain + config.guidance_scale * (predicted - plain)
        (x,) = back.step(predicted, t, x, eta=config.ddim_eta)
    return x


def sweep(base: Base, scorer: Scorer, cases: Sequence[Case], config: RunConfig, edits: Sequence[tuple[float, float]]) -> None:
    """Fits all cases at one setting; prints a line for each pair of eta and guidance."""
    latents = torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])
    target = concatenate([base.encode_prompt(case.text) for case in cases])
    tokens = Parameter(target.tokens.clone())
    optimised = Conditioning(tokens)
    train(base, latents, optimised, [tokens], "embed", config.embed, cases)
    optimised = Conditioning(tokens.detach())
    layers = own_layers(base, config.tune, cases)
    with applied(base, layers, 1.0 if config.tune.alpha is None else config.tune.alpha / config.tune.rank):
        train(base, latents, optimised, list(layers.values()), "tune", config.tune, cases)
        for eta, guidance in edits:
            how = config.edit.model_copy(update={"guidance_scale": guidance})
            (source,) = source_conditionings(target, optimised, [eta], how.source_eta)
            made = base.decode(edited(base, latents, interpolate(target, optimised, eta), source, how, cases))
            show(
                f"eta {eta:g}, guidance {guidance:g}",
                cases,
                [scorer.score(case, to_image(one)) for case, one in zip(cases, made, strict=True)],
            )


def show(title: str, cases: Sequence[Case], scores: Sequence[Score]) -> None:
    """One line: success / attributes / aligned in %, and PSNR, of pose and of the other kinds."""
    print(f"{title:28}", end="")
    for kind in ("pose", "others"):
        found = [score for case, score in zip(cases, scores, strict=True) if (case.kind == "pose") == (kind == "pose")]
        if found:
            shares = " / ".join(f"{100 * sum(getattr(one, name) for one in found) / len(found):3.0f}" for name in SHARES)
            print(f"{kind}: {shares}   PSNR {sum(one.psnr for one in found) / len(found):.1f} dB   ", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = defaults("lora")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the cases; 7 is that of the claims")
    for stage, config in (("embed", usual.embed), ("tune", usual.tune)):
        parser.add_argument(f"--{stage}", nargs=2, metavar=("STEPS", "RATE"), default=(config.steps, config.learning_rate))
    parser.add_argument("--etas", type=float, nargs="+", default=[usual.eta])
    parser.add_argument("--guidance", type=float, nargs="+", default=[usual.edit.guidance_scale])
    parser.add_argument("--source-eta", type=float, default=usual.edit.source_eta)
    parser.add_argument("--start", choices=("inverted", "noise"), default=usual.edit.start)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    pace = {
        stage: {"steps": int(getattr(asked, stage)[0]), "learning_rate": float(getattr(asked, stage)[1])} for stage in ("embed", "tune")
    }
    sampling = {"start": asked.start, "source_eta": asked.source_eta}
    config = defaults("lora", {**pace, "edit": sampling, "memory": {"device": "cpu", "dtype": "fp32", "optimizer": "adam"}})
    base = load_base("critters", resolve_runtime(config.memory))
    base.denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    scorer = Scorer(Judge.load(), CritterAlignment.load())
    cases = [case_at(asked.seed, index) for index in range(asked.cases)]
    sweep(base, scorer, cases, config, list(product(asked.etas, asked.guidance)))


if __name__ == "__main__":
    main()
