"""Fits and edits many cases of CritterBench as one batch, several times as fast as one after the other.

Each case has its own embedding and LoRA layers, and the noise, timesteps and initial weights of the benchmark. Adam is element-wise, so the
cases do not influence each other, and the images equal those of the benchmark up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import yaml
from study_store import MEMORY
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.batched import BatchedLora, added, new_layers, scale_of
from imagic_lora.bases.base import Base
from imagic_lora.bench.cases import Case
from imagic_lora.bench.catalogue import EmbeddedName, defaults
from imagic_lora.core.conditioning import Conditioning, concatenate
from imagic_lora.core.config import EditConfig, RunConfig
from imagic_lora.core.config_group import Config
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.noise import key
from imagic_lora.core.runtime import Processes
from imagic_lora.core.settings.merging import differences, merged
from imagic_lora.critters import SIZE, caption, longest_caption, render
from imagic_lora.photos.canvas import Canvas, to_pixels
from imagic_lora.sampling.diffusion import DiffusionSampler
from imagic_lora.sampling.flow import FlowSampler
from imagic_lora.sampling.inversion import NoiseRecorder, invert
from imagic_lora.sampling.mixing import mixed
from imagic_lora.sampling.pipelines import negative
from imagic_lora.training.embed import embed_stage, optimised
from imagic_lora.training.shared import in_step
from imagic_lora.training.stage import Stage
from imagic_lora.training.stage import train as stage_of
from imagic_lora.training.tune import tune_stage

UNSUPPORTED: Any = {"embed": {"noise"}, "memory": True, "monitoring": {"early_stop"}, "resolution": True}
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
    def parse(cls, text: str, base: EmbeddedName = "critters") -> Variant:
        """Reads changes of the defaults, ``key=value``, separated by spaces: settings of a run, and fields of :class:`Options`.

        Args:
            text: the changes.
            base: the embedded base whose recipe has the defaults.

        Raises:
            ImagicError: as :func:`~imagic_lora.core.settings.resolve.resolve`.
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
        return cls(text or "defaults", defaults(mode, merged(memory, changes), base), Options.model_validate(options))

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
    """The fits of all cases: the embeddings of each, and LoRA layers by name."""

    targets: list[Conditioning]
    optimised: list[Conditioning]
    layers: list[dict[str, Parameter]]


class CaseLora(BatchedLora):
    """The layers of the cases, one set a sample.

    Args:
        sets: the layers of each case. In a batch of ``n * cases`` samples while sampling they repeat ``n`` times.
        variant: scale, and whether the rank falls.
        sampling: whether images are sampled; the parts of a batch of the training have cases of their own.
    """

    def __init__(self, sets: Sequence[dict[str, Parameter]], variant: Variant, sampling: bool) -> None:
        super().__init__(sets, scale_of(variant.config.tune) * (variant.options.lora_scale if sampling else 1.0))
        self.sampling, self.rank_falls, self.rank = sampling, variant.options.rank_falls, variant.config.tune.rank
        self.times = torch.zeros(())

    def rows_of(self, size: int) -> Sequence[int]:
        if self.sampling:
            return [*range(len(self.sets))] * (size // len(self.sets))
        return [row for row in super().rows_of(size) for _ in range(size // len(self.rows))]

    def matrices(self, name: str, rows: Sequence[int]) -> Tensor:
        found = super().matrices(name, rows)
        if not self.rank_falls or ".lora_A." in name:
            return found
        kept = (self.rank * (1 - self.times.float() / 1000)).floor() + 1  # at least one, at most the rank
        mask = torch.arange(self.rank) < kept.expand(len(rows))[:, None]
        return found * mask.view(len(rows), 1, -1, *(1,) * (found.ndim - 3))


@contextmanager
def applied(base: Base, layers: Sequence[dict[str, Parameter]], variant: Variant, sampling: bool = True) -> Iterator[CaseLora | None]:
    """Adds LoRA layers to the denoiser, one set a case; none in mode embedding."""
    if not layers:
        yield None
        return
    lora = CaseLora(layers, variant, sampling)
    place = 1 if base.component == "unet" else 3  # of the timesteps, in [0, 1000), among the arguments of the denoiser
    hook = base.denoiser.register_forward_pre_hook(lambda _, args: setattr(lora, "times", args[place]))
    try:
        with added(base, lora):
            yield lora
    finally:
        hook.remove()


def encoded(base: Base, cases: Sequence[Case]) -> Tensor:
    """Latents of the photos, ``[cases, C, h, w]``."""
    return torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])


def train(stages: Sequence[Stage], lora: BatchedLora | None = None) -> None:
    """Runs the stages of all cases together, as :func:`imagic_lora.training.together.fit_together` does."""
    for stage in stages:
        stage.shared = True
    for _, report in in_step({k: stage_of(stage) for k, stage in enumerate(stages)}, lora.using if lora else lambda _: nullcontext()):
        if isinstance(report, Exception):
            raise report


def fitted(base: Base, latents: Tensor, cases: Sequence[Case], variant: Variant) -> Fitted:
    """Fits all cases with the settings of a variant."""
    config, prompts = variant.config, [PROMPTS[variant.options.initial](case) for case in cases]

    def encode(text: str) -> Conditioning:
        target = base.encode_vectors(text) if config.embed.space == "input" else base.encode_prompt(text)
        return replace(target, mask=base.word_mask(text)) if config.embed.tokens == "words" else target

    given = list(zip(latents.split(1), prompts, cases, strict=True))
    starts = [encode(text) for text in prompts]
    stages = [
        embed_stage(base, own, start, config.embed, case.index, Processes(), text)
        for (own, text, case), start in zip(given, starts, strict=True)
    ]
    train(stages)
    stored = starts if config.embed.stores_difference else [None] * len(stages)
    with torch.no_grad():
        found = [optimised(stage, start) for stage, start in zip(stages, stored, strict=True)]
    layers: list[dict[str, Parameter]] = []
    if "tune" in config.stages:
        layers = new_layers(base, config.tune, [key(case.index, "lora") for case in cases])
        with applied(base, layers, variant, sampling=False) as lora:
            tuned = zip(given, found, layers, strict=True)
            train([tune_stage(base, own, e, ps, config.tune, case.index, Processes()) for (own, _, case), e, ps in tuned], lora)
    return Fitted([encode(case.prompt) for case in cases], found, layers)


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
        null = negative(base, config, base.null())
        if base.architecture.process == "flow":
            sampler = FlowSampler(base, config, canvas, null)
            inverted = sampler.recorded if config.ddim_eta else sampler.inverted
        else:
            sampler = DiffusionSampler(base, config, canvas, null)
            inverted = partial(recorded, base, latents, config) if config.ddim_eta else partial(diffused, base, canvas, latents, config)
        if config.start == "inverted":
            parts = inverted(source, seeds)
            own = {seed: tuple(part[k : k + 1] for part in parts) for k, seed in enumerate(seeds)}
            sampler._inversion = lambda _, seed: own[seed]
        sources = [source] if config.start == "flow" else [source] * len(cases)  # the inversions of the others are made
        return base.decode(sampler.latents([mix], seeds, sources))


def diffused(
    base: Base, canvas: Canvas, latents: Tensor, config: EditConfig, source: Conditioning, seeds: Sequence[int]
) -> tuple[Tensor, ...]:
    """As :func:`imagic_lora.sampling.inversion.invert`, which takes a batch of photos; seeds have no effect."""
    return invert(base, canvas, latents, config, source)


def recorded(base: Base, latents: Tensor, config: EditConfig, source: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, ...]:
    """As :func:`imagic_lora.sampling.inversion.record_noise`, for a batch of photos: ``[cases, C, h, w]`` each."""
    recorder: Any = base.pipeline("text2image", NoiseRecorder).scheduler
    recorder.set_timesteps(config.steps)
    draws = [torch.randn(config.steps, *latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noised = [recorder.add_noise(latents, draw, t[None]) for draw, t in zip(torch.stack(draws, 1), recorder.timesteps, strict=True)]
    recorder.path, recorder.added = torch.stack([*noised, latents]), []
    for noised_latents, t in zip(noised, recorder.timesteps, strict=True):
        recorder.step(base.predict(noised_latents, t.expand(len(latents)), source), t, noised_latents, eta=config.ddim_eta)
    return recorder.path[0], *recorder.added
