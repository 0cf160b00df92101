"""One change of the settings at a time, on the same cases: ``python scripts/study_critters.py "embed.steps=30" "edit.start=noise"``.

A variant is a list of changes ``key=value``, separated by spaces; the first variant is always the defaults, and every other is compared
with it case by case. Keys are those of the settings (``embed.steps``, ``tune.rank``, ``edit.guidance_scale``, ``eta``) and those of
:class:`Options`, which has what was tried and did not become a setting. All cases are fitted as one batch, each with its own embedding and
LoRA layers and with the noise, timesteps and initial weights of the benchmark, so the images equal those of the benchmark up to rounding.
Choose on other seeds than those of the reported results. Results are appended to a file, from which a later run continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from diffusers.training_utils import compute_snr
from diffusers.utils import logging
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.lora import attached
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bases.process import Diffusion
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Score, Scorer
from imagic_lora.bench.summary import bootstrapped
from imagic_lora.core.conditioning import Conditioning, concatenate, interpolate
from imagic_lora.core.config import Config, EmbedConfig, MemoryConfig, RunConfig, TuneConfig
from imagic_lora.core.noise import key, noise_at, times_at
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.core.settings import merged
from imagic_lora.critters import caption, longest_caption, render
from imagic_lora.critters.judge import Judge
from imagic_lora.photos.canvas import to_image, to_pixels
from imagic_lora.sampling.inversion import NoiseRecorder, NoiseReplayer
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.optimizers import build_optimizer

ENCODER = "text_encoder"
MEASURES = {"success": 100, "attributes": 100, "aligned": 100, "kept": 100, "psnr": 1}  # factors to percent, and dB to the true edit


class Options(Config):
    """Changes of the method that are not settings of the product."""

    initial: Literal["target", "caption", "full"] = "target"
    """Prompt whose embedding stage 1 starts from: the target prompt, the caption of the photo, or its caption with the identity."""
    last_tokens: int | None = Field(default=None, ge=1)
    """Stage 1 optimises only this many tokens, the last ones (HiPer, arXiv 2303.08767)."""
    fitted: Literal["both", "embedding", "layers", "none", "joint"] = "both"
    """What is fitted: both stages, one of them, none, or both as one stage."""
    weighting: Literal["uniform", "min-snr", "clean"] = "uniform"
    """Weights of the loss over timesteps, relative to the base's own prediction: uniform, min-SNR 5 (arXiv 2303.09556), or the error of the
    clean latents."""
    times_from: float = Field(default=0.0, ge=0, lt=1)
    """Smallest time of the training samples, in [0, 1)."""
    times_to: float = Field(default=1.0, gt=0, le=1)
    """Largest time of the training samples of stage 2, in (0, 1]."""
    rank_falls: bool = False
    """The rank of LoRA falls linearly with the timestep (T-LoRA, arXiv 2507.05964)."""
    lora_scale: float = 1.0
    """Scale of the LoRA update while sampling."""
    forget: Literal["", "down", "mid", "up", "attn1", "attn2", "resnets"] = ""
    """Layers whose LoRA update is left out while sampling (Forgedit, arXiv 2309.10556)."""
    skip: int = Field(default=0, ge=0)
    """Start inverted: number of sampling steps left out, from the noisiest on (arXiv 2304.06140)."""
    by_truth: bool = False
    """Sample at the embedding of the full caption of the true edit instead of a mixture: a bound, not a method."""


@dataclass(frozen=True)
class Variant:
    """Settings of a run on the embedded base, and options of the study."""

    name: str
    config: RunConfig
    options: Options

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads changes of the defaults: ``key=value``, separated by spaces; ``alone`` as a key is an option of the study."""
        changes: dict[str, Any] = {}
        for change in text.split():
            path, _, value = change.partition("=")
            nested: Any = yaml.safe_load(value)
            for part in reversed(path.split(".")):
                nested = {part: nested}
            changes = merged(changes, nested)
        options = {name: changes.pop(name) for name in Options.model_fields if name in changes}
        memory = {"memory": {"device": "cpu", "dtype": "fp32", "optimizer": "adam"}}
        return cls(text or "defaults", defaults("lora", merged(memory, changes)), Options.model_validate(options))

    def fit_key(self) -> str:
        """A text that is equal for variants with the same fit."""
        options = self.options.model_dump(include={"initial", "last_tokens", "fitted", "weighting", "times_from", "times_to", "rank_falls"})
        return json.dumps([self.config.model_dump(include={"embed", "tune"}, mode="json"), options])


@dataclass
class Fitted:
    """The fit of all cases: their embeddings, with the vectors of the tokens in the input space, and LoRA layers, ``[cases, ...]``."""

    target: Conditioning
    optimised: Conditioning
    layers: dict[str, Parameter]


def own_layers(base: Base, config: TuneConfig, cases: Sequence[Case]) -> dict[str, Parameter]:
    """LoRA layers of every case by name, ``[cases, ...]``, initialised by :func:`imagic_lora.adapters.lora.attached`."""
    initial: list[dict[str, Tensor]] = []
    for case in cases:
        with attached(base, config, key(case.index, "lora")) as layers:
            initial.append({name: layer.detach().clone() for name, layer in layers.items()})
    return {name: Parameter(torch.stack([layers[name] for layers in initial])) for name in initial[0]}


@contextmanager
def applied(base: Base, layers: dict[str, Parameter], scale: float, options: Options, sampling: bool) -> Iterator[None]:
    """Adds LoRA layers to the denoiser, one set per sample; a batch of ``n * cases`` samples repeats the sets ``n`` times."""
    modules: dict[str, Any] = dict(base.denoiser.named_modules())
    times: list[Tensor] = []
    hooks = [base.denoiser.register_forward_pre_hook(lambda _, args: times.__setitem__(slice(None), [args[1]]))]
    for name in sorted({name.split(".lora_")[0] for name in layers}):
        if sampling and options.forget and options.forget in name:
            continue
        down, up = (next(value for key, value in layers.items() if key.startswith(f"{name}.lora_{part}.")) for part in "AB")
        share = scale * (options.lora_scale if sampling else 1.0)
        hooks.append(modules[name].register_forward_hook(_added(down, up, share, times if options.rank_falls else None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _added(down: Tensor, up: Tensor, scale: float, times: list[Tensor] | None) -> Any:
    """A forward hook that adds ``scale * up(down(x))`` to a linear layer or a convolution; with times, at a rank that falls with them."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs[:1]
        repeats, rank = len(x) // len(down), down.shape[1]
        a, b = (layer.flatten(2).repeat(repeats, 1, 1) for layer in (down, up))
        if times is not None:
            kept = (rank * (1 - times[0].float() / 1000)).floor() + 1  # at least one, at most the rank
            b = b * (torch.arange(rank) < kept.expand(len(x))[:, None])[:, None]
        if isinstance(module, torch.nn.Linear):
            return output + scale * (x @ a.mT @ b.mT)
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        return output + scale * (b @ (a @ columns)).view_as(output)

    return hook


def weights(base: Base, times: Tensor, weighting: str) -> Tensor:
    """Weight of each sample's loss, ``[B]``."""
    if weighting == "uniform":
        return torch.ones(len(times))
    assert isinstance(base.process, Diffusion)
    snr = compute_snr(base.process.scheduler, base.timesteps(times))
    clean = 1 / snr if base.prediction_type == "epsilon" else 1 / (snr + 1)  # times the base's own loss: the error of the clean latents
    return clean if weighting == "clean" else snr.clamp(max=5) * clean


def train(
    base: Base,
    latents: Tensor,
    conditioning: Callable[[], Conditioning],
    groups: Sequence[tuple[Sequence[Parameter], float]],
    stage: Literal["embed", "tune"],
    config: EmbedConfig | TuneConfig,
    cases: Sequence[Case],
    options: Options,
) -> None:
    """Trains parameters, each group at its rate, for all cases together. Adam is element-wise, so the cases do not influence each other."""
    optimizers = [build_optimizer("adam", parameters, rate) for parameters, rate in groups]
    samples, last = range(config.batch_size), options.last_tokens
    for step in range(config.steps):
        noise = torch.stack([noise_at(case.index, stage, step, samples, tuple(latents.shape[1:])) for case in cases])
        times = torch.stack([times_at(case.index, stage, step, samples, config.batch_size, config.timesteps) for case in cases])
        times = options.times_from + ((options.times_to if stage == "tune" else 1.0) - options.times_from) * times
        for sample in samples:
            loss = denoising_loss(base, latents, conditioning(), noise[:, sample], times[:, sample])
            ((loss * weights(base, times[:, sample], options.weighting)).sum() / config.batch_size).backward()
        gradient = groups[0][0][0].grad
        if last and gradient is not None and (stage == "embed" or options.fitted == "joint"):
            gradient[:, :-last] = 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def fitted(base: Base, latents: Tensor, cases: Sequence[Case], variant: Variant) -> Fitted:
    """Fits all cases with the settings of a variant."""
    config, options = variant.config, variant.options
    prompts = {
        "target": lambda case: case.prompt,
        "caption": lambda case: caption(case.source),
        "full": lambda c: longest_caption(c.source),
    }
    target, initial = (conditioned(base, [prompts[kind](case) for case in cases], config.embed) for kind in ("target", options.initial))
    tokens = Parameter((initial.vectors.get(ENCODER, initial.tokens)).clone())
    masks = [base.vector_masks(prompts[options.initial](case))[ENCODER] for case in cases]
    trained = torch.cat([words | padding for words, padding in masks])[..., None]

    def current() -> Conditioning:
        if not initial.vectors:
            return Conditioning(tokens)
        return base.encode_vectors("", {ENCODER: torch.where(trained, tokens, initial.vectors[ENCODER])})

    embedding = ([tokens], config.embed.learning_rate)
    layers = own_layers(base, config.tune, cases)
    with applied(base, layers, scale_of(config.tune), options, sampling=False):
        lora = (list(layers.values()), config.tune.learning_rate)
        if options.fitted == "joint":
            both = config.tune.model_copy(update={"steps": config.embed.steps + config.tune.steps})
            train(base, latents, current, [embedding, lora], "tune", both, cases, options)
        if options.fitted in ("both", "embedding"):
            train(base, latents, current, [embedding], "embed", config.embed, cases, options)
        with torch.no_grad():
            optimised = current()
        if options.fitted in ("both", "layers"):
            train(base, latents, lambda: optimised, [lora], "tune", config.tune, cases, options)
    return Fitted(target, Conditioning(optimised.tokens.detach(), vectors=optimised.vectors), layers)


@torch.no_grad()
def conditioned(base: Base, prompts: Sequence[str], config: EmbedConfig) -> Conditioning:
    """The conditionings of prompts as one batch, ``[cases, ...]``, with the vectors of their tokens in the input space."""
    if config.space == "output":
        return concatenate([base.encode_prompt(prompt) for prompt in prompts])
    return base.encode_vectors("", {ENCODER: torch.cat([base.encode_vectors(prompt).vectors[ENCODER] for prompt in prompts])})


@torch.no_grad()
def mixed(base: Base, fit: Fitted, cases: Sequence[Case], eta: float, padding_eta: float) -> Conditioning:
    """As :func:`imagic_lora.sampling.mixing.mixed`, for a batch of cases."""
    if not fit.optimised.vectors:
        return interpolate(fit.target, fit.optimised, eta)
    words, padding = (torch.cat(parts) for parts in zip(*(base.vector_masks(case.prompt)[ENCODER] for case in cases), strict=True))
    shares = (eta * words + eta * padding_eta * padding)[..., None]
    return base.encode_vectors("", {ENCODER: torch.lerp(fit.optimised.vectors[ENCODER], fit.target.vectors[ENCODER], shares)})


def scale_of(config: TuneConfig) -> float:
    """Scale of the LoRA update."""
    return 1.0 if config.alpha is None else config.alpha / config.rank


@torch.no_grad()
def edited(base: Base, latents: Tensor, fit: Fitted, cases: Sequence[Case], variant: Variant) -> Tensor:
    """Latents of the edits of all cases."""
    config, options, eta = variant.config.edit, variant.options, variant.config.eta
    mix, source = (mixed(base, fit, cases, at, config.padding_eta) for at in (eta, min(eta, config.source_eta)))
    if options.by_truth:
        mix = concatenate([base.encode_prompt(longest_caption(case.truth)) for case in cases])
        source = concatenate([base.encode_prompt(longest_caption(case.source)) for case in cases])
    path: Any = NoiseRecorder.from_config(base.scheduler().config)
    path.set_timesteps(config.steps)
    draws = torch.stack([torch.randn(config.steps, *latents.shape[1:], generator=torch.Generator().manual_seed(c.index)) for c in cases], 1)
    first, added, x = 0, [torch.zeros_like(latents)] * config.steps, draws[0]
    if config.start == "image":
        first = config.steps - int(config.steps * config.strength)
        x = path.add_noise(latents, draws[0], path.timesteps[first : first + 1])
    elif config.start == "inverted":
        path.path = torch.stack([*(path.add_noise(latents, draw, t[None]) for draw, t in zip(draws, path.timesteps, strict=True)), latents])
        path.added = []
        for noised, t in zip(path.path, path.timesteps, strict=False):
            path.step(base.predict(noised, t.expand(len(noised)), source), t, noised, eta=config.ddim_eta)
        first, added = options.skip, path.added
        x = path.path[first]
    back: Any = NoiseReplayer.from_config(path.config)
    back.set_timesteps(config.steps)
    back.added, null = list(added[first:]), base.null()
    for t in back.timesteps[first:]:
        predicted = base.predict(x, t.expand(len(x)), mix)
        if config.guidance_scale > 1 and null is not None:
            plain = base.predict(x, t.expand(len(x)), null)
            predicted = plain + config.guidance_scale * (predicted - plain)
        (x,) = back.step(predicted, t, x, eta=config.ddim_eta)
    return x


def study(
    base: Base, scorer: Scorer, cases: Sequence[Case], variants: Sequence[Variant], store: Path
) -> Iterator[tuple[Variant, list[Score]]]:
    """Fits and edits all cases with every variant, and stores the scores; yields those of each variant."""
    latents = torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])
    known = {row["key"]: [Score(**score) for score in row["scores"]] for row in map(json.loads, store.open())} if store.exists() else {}
    fits: dict[str, Fitted] = {}
    for variant in variants:
        options = variant.options.model_dump(exclude_defaults=True)
        row_key = json.dumps([variant.name, variant.config.model_dump(mode="json"), options, len(cases)])
        if row_key not in known:
            if variant.fit_key() not in fits:
                fits = {variant.fit_key(): fitted(base, latents, cases, variant)}
            fit = fits[variant.fit_key()]
            with applied(base, fit.layers, scale_of(variant.config.tune), variant.options, sampling=True):
                images = base.decode(edited(base, latents, fit, cases, variant))
            known[row_key] = [scorer.score(case, to_image(image)) for case, image in zip(cases, images, strict=True)]
            with store.open("a") as file:
                file.write(json.dumps({"key": row_key, "name": variant.name, "scores": [vars(score) for score in known[row_key]]}) + "\n")
        yield variant, known[row_key]


def line(name: str, scores: Sequence[Score], usual: Sequence[Score], cases: Sequence[Case]) -> str:
    """One line: the measures for all cases, success on pose edits, the median identity, and the paired difference to the defaults."""
    parts = [f"{factor * sum(getattr(score, measure) for score in scores) / len(scores):5.1f}" for measure, factor in MEASURES.items()]
    pose = [score.success for case, score in zip(cases, scores, strict=True) if case.kind == "pose"]
    distances = sorted(9.0 if score.identity is None else score.identity for score in scores)
    differences = []
    for measure in ("success", "aligned", "psnr"):
        pairs = zip(scores, usual, strict=True)
        mean = bootstrapped([MEASURES[measure] * (getattr(a, measure) - getattr(b, measure)) for a, b in pairs])
        assert mean is not None
        differences.append(f"{mean.mean:+5.1f} [{mean.low:+.1f} {mean.high:+.1f}]")
    half = distances[len(distances) // 2]
    return f"{name:44} {' '.join(parts)}  pose {100 * sum(pose) / len(pose):3.0f}  identity {half:.2f}   {'  '.join(differences)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help="changes of the defaults; options of the study: " + ", ".join(Options.model_fields))
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    parser.add_argument("--base", type=Path, default=CRITTERS, help="folder of the base")
    parser.add_argument("--store", type=Path, default=Path("outputs/study"), help="folder of the results")
    args = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    base = load_base(str(args.base), resolve_runtime(MemoryConfig(device="cpu", dtype="fp32", optimizer="adam")))
    cases = [case_at(args.seed, index) for index in range(args.cases)]
    args.store.mkdir(parents=True, exist_ok=True)
    store = args.store / f"{base.fingerprint[:12]}-{args.seed}.jsonl"
    variants = [Variant.parse(text) for text in ("", *args.variants)]
    print(f"{'':44} {' '.join(f'{measure[:5]:>5}' for measure in MEASURES)}{'':27}against the defaults: success, aligned, dB")
    usual: list[Score] = []
    for variant, scores in study(base, Scorer(Judge.load(), CritterAlignment.load()), cases, variants, store):
        usual = usual or scores
        print(line(variant.name, scores, usual, cases), flush=True)


if __name__ == "__main__":
    main()
