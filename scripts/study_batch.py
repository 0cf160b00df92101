"""Fits and edits many cases of CritterBench as one batch, several times as fast as one after the other.

Each case has its own embedding and LoRA layers, and the noise, timesteps and initial weights of the benchmark. Adam is element-wise, so the
cases do not influence each other, and the images equal those of the benchmark up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from study_store import MEMORY
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.lora import attached
from imagic_lora.bases.base import Base
from imagic_lora.bench.cases import Case
from imagic_lora.bench.catalogue import defaults
from imagic_lora.core.conditioning import Conditioning, concatenate
from imagic_lora.core.config import Config, EditConfig, EmbedConfig, RunConfig, TuneConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.noise import key, noise_at, times_at
from imagic_lora.core.settings import differences, merged
from imagic_lora.critters import SIZE, caption, longest_caption, render
from imagic_lora.photos.canvas import Canvas, to_pixels
from imagic_lora.sampling.diffusion import DiffusionSampler
from imagic_lora.sampling.inversion import NoiseRecorder, invert
from imagic_lora.sampling.mixing import mixed
from imagic_lora.sampling.pipelines import negative
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.optimizers import build_optimizer

ENCODER = "text_encoder"
UNSUPPORTED: Any = {"embed": {"noise", "tokens", "relative"}, "memory": True, "monitoring": {"early_stop"}, "resolution": True}
"""Settings that a batch of fits has only at these values: those of ``RunConfig(memory=MEMORY)``."""


class Options(Config):
    """Changes of the method that are not settings of the product."""

    initial: Literal["target", "caption", "full"] = "target"
    """Prompt whose embedding stage 1 starts from: the target prompt, the caption of the photo, or its caption with the identity."""
    rank_falls: bool = False
    """The rank of LoRA falls linearly with the timestep (T-LoRA, arXiv 2507.05964)."""
    lora_scale: float = 1.0
    """Scale of the LoRA update while sampling."""
    by_truth: bool = False
    """Sample at the embedding of the full caption of the true edit instead of a mixture: a bound, not a method."""


PROMPTS: dict[str, Callable[[Case], str]] = {
    "target": lambda case: case.prompt,
    "caption": lambda case: caption(case.source),
    "full": lambda case: longest_caption(case.source),
}
"""The prompts of :attr:`Options.initial`."""


@dataclass(frozen=True)
class Variant:
    """Settings of a run on the embedded base, and options of the study."""

    name: str
    config: RunConfig
    options: Options

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads changes of the defaults, ``key=value``, separated by spaces: settings of a run, and fields of :class:`Options`.

        Raises:
            ImagicError: as :func:`~imagic_lora.core.settings.resolve`.
        """
        changes: dict[str, Any] = {}
        for change in text.split():
            path, _, value = change.partition("=")
            nested: Any = yaml.safe_load(value)
            for part in reversed(path.split(".")):
                nested = {part: nested}
            changes = merged(changes, nested)
        options = {name: changes.pop(name) for name in Options.model_fields if name in changes}
        memory = {"memory": MEMORY.model_dump(include={"device", "dtype", "optimizer"})}
        mode = changes.get("tune", {}).get("mode", "lora")
        return cls(text or "defaults", defaults(mode, merged(memory, changes)), Options.model_validate(options))

    def key(self, *others: Any) -> list[Any]:
        """What a result depends on, as JSON values, followed by others."""
        return [self.name, self.config.model_dump(mode="json"), self.options.model_dump(exclude_defaults=True), *others]

    def fit_key(self) -> str:
        """A text that is equal for variants with the same fit."""
        options = self.options.model_dump(include={"initial", "rank_falls"})
        return json.dumps([self.config.model_dump(include={"embed", "tune"}, mode="json"), options])

    def check_batched(self) -> None:
        """Checks that a batch of fits supports all settings.

        Raises:
            ImagicError: it does not.
        """
        usual, given = (config.model_dump(include=UNSUPPORTED) for config in (RunConfig(memory=MEMORY), self.config))
        changed = differences(usual, given) + (["tune.mode is 'full'"] if self.config.tune.mode == "full" else [])
        if changed:
            raise ImagicError(f"{', '.join(changed)} in a batch of fits", "settings that a batch supports", "add --fit")


@dataclass
class Fitted:
    """The fits of all cases: the embeddings of each, and LoRA layers by name, ``[cases, ...]``."""

    targets: list[Conditioning]
    optimised: list[Conditioning]
    layers: dict[str, Parameter]


def own_layers(base: Base, config: TuneConfig, cases: Sequence[Case]) -> dict[str, Parameter]:
    """LoRA layers of every case by name, ``[cases, ...]``, initialised by :func:`imagic_lora.adapters.lora.attached`."""
    initial: list[dict[str, Tensor]] = []
    for case in cases:
        with attached(base, config, key(case.index, "lora")) as layers:
            initial.append({name: layer.detach().clone() for name, layer in layers.items()})
    return {name: Parameter(torch.stack([layers[name] for layers in initial])) for name in initial[0]}


@contextmanager
def applied(base: Base, layers: Mapping[str, Tensor], variant: Variant, sampling: bool = True) -> Iterator[None]:
    """Adds LoRA layers to the denoiser, one set per sample; a batch of ``n * cases`` samples repeats the sets ``n`` times."""
    config, options = variant.config.tune, variant.options
    scale = (1.0 if config.alpha is None else config.alpha / config.rank) * (options.lora_scale if sampling else 1.0)
    modules: dict[str, Any] = dict(base.denoiser.named_modules())
    times: list[Tensor] = []
    hooks = [base.denoiser.register_forward_pre_hook(lambda _, args: times.__setitem__(slice(None), [args[1]]))]
    for name in sorted({name.split(".lora_")[0] for name in layers}):
        down, up = (next(value for key, value in layers.items() if key.startswith(f"{name}.lora_{part}.")) for part in "AB")
        hooks.append(modules[name].register_forward_hook(_added(down, up, scale, times if options.rank_falls else None)))
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


def encoded(base: Base, cases: Sequence[Case]) -> Tensor:
    """Latents of the photos, ``[cases, C, h, w]``."""
    return torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])


def train(
    base: Base,
    latents: Tensor,
    conditioning: Callable[[], Conditioning],
    parameters: Sequence[Parameter],
    stage: Literal["embed", "tune"],
    config: EmbedConfig | TuneConfig,
    cases: Sequence[Case],
) -> None:
    """Trains parameters for all cases together."""
    optimizer, samples = build_optimizer("adam", parameters, config.learning_rate), range(config.batch_size)
    for step in range(config.steps):
        noise = torch.stack([noise_at(case.index, stage, step, samples, tuple(latents.shape[1:])) for case in cases])
        times = torch.stack([times_at(case.index, stage, step, samples, config.batch_size, config.timesteps) for case in cases])
        for sample in samples:
            loss = denoising_loss(base, latents, conditioning(), noise[:, sample], times[:, sample])
            (loss.sum() / config.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def fitted(base: Base, latents: Tensor, cases: Sequence[Case], variant: Variant) -> Fitted:
    """Fits all cases with the settings of a variant."""
    config, prompts = variant.config, [PROMPTS[variant.options.initial](case) for case in cases]
    in_vectors = config.embed.space == "input"
    encode = base.encode_vectors if in_vectors else base.encode_prompt
    targets = [encode(case.prompt) for case in cases]
    start = torch.cat([each.vectors[ENCODER] if in_vectors else each.tokens for each in map(encode, prompts)]).detach()
    masks = [base.vector_masks(prompt)[ENCODER] for prompt in prompts] if in_vectors else []
    trained = torch.cat([words | padding for words, padding in masks])[..., None] if in_vectors else torch.tensor(True)
    tokens = Parameter(start.clone())

    def current() -> Conditioning:
        if not in_vectors:
            return Conditioning(tokens)
        return Conditioning(base.encode_vectors("", {ENCODER: torch.where(trained, tokens, start)}).tokens)

    train(base, latents, current, [tokens], "embed", config.embed, cases)
    with torch.no_grad():
        optimised = Conditioning(current().tokens.detach())
    layers = own_layers(base, config.tune, cases) if "tune" in config.stages else {}
    if layers:
        with applied(base, layers, variant, sampling=False):
            train(base, latents, lambda: optimised, list(layers.values()), "tune", config.tune, cases)
    vectors = torch.where(trained, tokens, start).detach()
    found = [
        Conditioning(optimised.tokens[k : k + 1], vectors={ENCODER: vectors[k : k + 1]} if in_vectors else {}) for k in range(len(cases))
    ]
    return Fitted(targets, found, layers)


@torch.no_grad()
def edited(base: Base, latents: Tensor, fit: Fitted, cases: Sequence[Case], variant: Variant) -> Tensor:
    """Pixels of the edits of all cases, ``[cases, 3, H, W]`` in [-1, 1]."""
    config, eta = variant.config.edit, variant.config.eta
    fits = list(zip(cases, fit.targets, fit.optimised, strict=True))

    def mixture(at: float) -> Conditioning:
        return concatenate([mixed(base, case.prompt, target, optimised, at, config.padding_eta) for case, target, optimised in fits])

    mix, source = mixture(eta), mixture(min(eta, config.source_eta))
    if variant.options.by_truth:
        mix = concatenate([base.encode_prompt(longest_caption(case.truth)) for case in cases])
        source = concatenate([base.encode_prompt(longest_caption(case.source)) for case in cases])
    photos = torch.cat([to_pixels(render(case.source)) for case in cases])
    canvas, seeds = Canvas(photos, (0, 0, SIZE, SIZE), (SIZE, SIZE)), [case.index for case in cases]
    with applied(base, fit.layers, variant):
        sampler = DiffusionSampler(base, config, canvas, negative(base, config, base.null()))
        if config.start == "inverted":
            parts = recorded(base, latents, source, seeds, config) if config.ddim_eta else invert(base, canvas, latents, config, source)
            own = {seed: tuple(part[k : k + 1] for part in parts) for k, seed in enumerate(seeds)}
            sampler._inversion = lambda _, seed: own[seed]
        return base.decode(sampler.latents([mix], seeds, [source] * len(cases)))


def recorded(base: Base, latents: Tensor, source: Conditioning, seeds: Sequence[int], config: EditConfig) -> tuple[Tensor, ...]:
    """As :func:`imagic_lora.sampling.inversion.record_noise`, for a batch of photos: ``[cases, C, h, w]`` each."""
    recorder: Any = base.pipeline("text2image", NoiseRecorder).scheduler
    recorder.set_timesteps(config.steps)
    draws = [torch.randn(config.steps, *latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noised = [recorder.add_noise(latents, draw, t[None]) for draw, t in zip(torch.stack(draws, 1), recorder.timesteps, strict=True)]
    recorder.path, recorder.added = torch.stack([*noised, latents]), []
    for noised_latents, t in zip(noised, recorder.timesteps, strict=True):
        recorder.step(base.predict(noised_latents, t.expand(len(latents)), source), t, noised_latents, eta=config.ddim_eta)
    return recorder.path[0], *recorder.added
