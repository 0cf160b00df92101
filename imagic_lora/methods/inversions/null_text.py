"""Null-text inversion (arXiv 2211.09794) and its ablations."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from ...bases.base import Base
from ...core.conditioning import Conditioning
from ...core.errors import ImagicError
from ...sampling.trajectory import Path, Step, Trajectory, path, predictions
from ...training.updating.updates import loss_scale
from ..method import Load, Passes
from ..sampled import EncodedRequest, SamplingConfig, guided_passes
from .ddim import pivot
from .inverted import Inverted, InvertingMethod, null_of

Ablation = Literal[
    "none",
    "vqae",
    "random-pivot",
    "global",
    "random-caption",
    "textual-inversion",
    "pivotal-textual-inversion",
    "no-pivot",
]


class NullTextConfig(SamplingConfig):
    """Settings of null-text inversion, with the defaults of the official code."""

    guidance_scale: float = Field(default=7.5, gt=1, le=50)
    """Scale of classifier-free guidance, of the optimisation and of the edit. Above 1: without guidance the null has no effect."""
    inner_steps: int = Field(default=10, ge=0, le=1000)
    """Largest number of optimisation steps at each sampling step. 0: DDIM inversion. Ablations without an embedding of their own for each
    step make as many in total."""
    learning_rate: float = Field(default=1e-2, gt=0, le=1)
    """Learning rate at the first sampling step. It falls to half of it at the last one, if each has its own embedding."""
    stop_below: float = Field(default=1e-5, ge=0, le=1)
    """Loss at which the optimisation of the first sampling step stops. The limit rises to 100 times this value at the last one."""
    ablation: Ablation = "none"
    """What is left out, as in figure 4 of the paper. none: nothing. vqae: everything; the photo is encoded and decoded, without an edit.
    random-pivot: the pivot is the photo with one random noise, not its inversion. global: one null for all sampling steps. random-caption:
    the source prompt is one of other_captions. textual-inversion: one source embedding is trained at random noise levels, the null is
    not. pivotal-textual-inversion: a source embedding for each sampling step instead of a null. no-pivot: one null is trained at random
    noise levels."""
    other_captions: tuple[str, ...] = ()
    """Captions of other images, for random-caption. The seed of the request selects one."""

    @model_validator(mode="after")
    def _has_captions(self) -> NullTextConfig:
        if self.ablation == "random-caption" and not self.other_captions:
            raise ValueError("other_captions, of which random-caption takes one")
        return self


@dataclass(frozen=True)
class _Plan:
    """What an ablation optimises, and towards what.

    Args:
        pivot: the path that the latents are led along: the inversion of the photo, the photo with one noise, or None for the training
            loss at random noise levels.
        moving: the embedding that is optimised: the null, or the source prompt.
        each_step: whether each sampling step has its own embedding.
    """

    pivot: Literal["inversion", "noise"] | None = "inversion"
    moving: Literal["null", "source"] = "null"
    each_step: bool = True


_PLANS: dict[Ablation, _Plan] = {
    "none": _Plan(),
    "random-pivot": _Plan(pivot="noise"),
    "global": _Plan(each_step=False),
    "random-caption": _Plan(),
    "textual-inversion": _Plan(pivot=None, moving="source", each_step=False),
    "pivotal-textual-inversion": _Plan(moving="source"),
    "no-pivot": _Plan(pivot=None, each_step=False),
}


class NullTextInversion(InvertingMethod[NullTextConfig]):
    """Null-text inversion (arXiv 2211.09794): the null of each sampling step is optimised until guidance follows the inverted photo.

    The pivot is the path of DDIM inversion without guidance. At each step from noise to photo, Adam minimises the mean squared error
    between the guided step and the next latents of the pivot; the null starts from that of the step before. Only tokens are optimised: a
    pooled embedding stays that of the empty prompt. This is the inversion alone; the paper edits with Prompt-to-Prompt on top.
    """

    name, config_class = "null-text", NullTextConfig
    requires = frozenset({"source_prompt"})

    def invert(self, encoded: EncodedRequest, config: NullTextConfig) -> Inverted:
        if config.ablation == "vqae":
            raise ImagicError("ablation vqae, which inverts nothing", "another ablation, or none", "change the ablation")
        return _Inversion(encoded, config).inverted()

    def sample(self, encoded: EncodedRequest, config: NullTextConfig) -> tuple[Image.Image, Mapping[str, Any]]:
        return (encoded.image(encoded.clean), {}) if config.ablation == "vqae" else super().sample(encoded, config)

    def passes_with(self, base: Base, config: NullTextConfig) -> Passes:
        if config.ablation == "vqae":
            return Passes(0)
        plan, steps, inner = _PLANS[config.ablation], config.steps, config.inner_steps
        sampling = guided_passes(config.guidance_scale)
        inversion = 0 if plan.pivot == "noise" else steps
        if plan.pivot is None:
            fit = steps * inner * (2 if plan.moving == "null" else 1)
        else:
            fit = steps * (1 + inner + sampling) if plan.each_step else steps * inner * (2 + sampling)
        return Passes(inversion + fit + steps * sampling, steps * inner, at_most=plan.each_step)

    def load_with(self, base: Base, config: NullTextConfig) -> Load:
        return super().load_with(base, config)._replace(gradients=config.ablation != "vqae")


class _Inversion:
    """One run of null-text inversion or of one of its ablations.

    Args:
        encoded: the request.
        config: the settings; any ablation but vqae.
    """

    def __init__(self, encoded: EncodedRequest, config: NullTextConfig) -> None:
        self.config, self.plan, self.null = config, _PLANS[config.ablation], null_of(encoded)
        if config.ablation == "random-caption":
            source = encoded.encode_prompt(random.Random(encoded.request.seed).choice(config.other_captions))
            encoded = replace(encoded, source=source)
        assert encoded.source is not None
        self.encoded, self.base, self.source = encoded, encoded.base, encoded.source
        self.trajectory = Trajectory(self.base, config.steps)
        moving = self.null if self.plan.moving == "null" else self.source
        self.tokens = moving.tokens.clone().requires_grad_()
        self.moving = replace(moving, tokens=self.tokens)
        self.fixed = self.source if self.plan.moving == "null" else self.null

    def inverted(self) -> Inverted:
        """Runs the optimisation."""
        steps, target = self.config.steps, self._pivot()
        if target is None:
            found = [self._train()] * steps
        else:
            found = self._follow(target) if self.plan.each_step else [self._follow_repeatedly(target)] * steps
        sources, nulls = [self.source] * steps, [self.null] * steps
        if self.plan.moving == "null":
            nulls = found
        else:
            sources = found
        latents = target or pivot(replace(self.encoded, source=sources[0]), self.trajectory)
        return Inverted(self.base, self.trajectory, latents, sources, nulls)

    def _found(self) -> Conditioning:
        return replace(self.moving, tokens=self.tokens.detach().clone())

    def _pivot(self) -> Path | None:
        if self.plan.pivot is None:
            return None
        if self.plan.pivot == "inversion":
            return pivot(self.encoded, self.trajectory)
        noise, clean = self.encoded.noise(), self.encoded.clean
        return {position: self.trajectory.noised(clean, noise, position) for position in range(self.config.steps + 1)}

    def _follow(self, target: Path) -> list[Conditioning]:
        """Optimises the embedding of each step in turn, along the path that the optimised embeddings lead to."""
        found = []

        def predict(latents: Tensor, step: Step) -> Tensor:
            done = step.index / self.config.steps
            optimizer = torch.optim.Adam([self.tokens], lr=self.config.learning_rate * (1 - done / 2))
            fixed = predictions(self.base, latents, step.timestep, self.fixed)[0]
            stop_below = self.config.stop_below * (1 + 100 * done)
            for _ in range(self.config.inner_steps):
                if self._minimise(optimizer, lambda: self._distance(step, fixed, target)) < stop_below:
                    break
            found.append(self._found())
            return self._guided(latents, step)

        path(self.trajectory.forwards(target[0], predict))
        return found

    def _follow_repeatedly(self, target: Path) -> Conditioning:
        """Optimises one embedding along the whole path again and again, with one optimisation step at each sampling step."""
        optimizer = torch.optim.Adam([self.tokens], lr=self.config.learning_rate)

        def predict(latents: Tensor, step: Step) -> Tensor:
            fixed = predictions(self.base, latents, step.timestep, self.fixed)[0]
            self._minimise(optimizer, lambda: self._distance(step, fixed, target))
            return self._guided(latents, step)

        for _ in range(self.config.inner_steps):
            path(self.trajectory.forwards(target[0], predict))
        return self._found()

    def _train(self) -> Conditioning:
        """Optimises one embedding by the training loss of the base, each time at a random noise level with new noise."""
        optimizer = torch.optim.Adam([self.tokens], lr=self.config.learning_rate)
        draw, clean = torch.Generator().manual_seed(self.encoded.request.seed), self.encoded.clean
        for _ in range(self.config.steps * self.config.inner_steps):
            timestep = self.base.timesteps(torch.rand(1, generator=draw)).to(clean.device)
            noise = torch.randn(clean.shape, generator=draw).to(clean)
            self._minimise(optimizer, lambda: self._training_loss(noise, timestep))  # noqa: B023
        return self._found()

    def _minimise(self, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
        """Makes one step of the optimiser, and returns the loss before it."""
        scale = loss_scale(self.base.runtime)
        with torch.enable_grad():
            value = loss()
            optimizer.zero_grad()
            (value * scale).backward()
        assert self.tokens.grad is not None
        self.tokens.grad.div_(scale)
        optimizer.step()
        return float(value.detach())

    def _distance(self, step: Step, fixed: Tensor, target: Path) -> Tensor:
        """Mean squared error between the guided step and the latents of the pivot that it should lead to."""
        moving = predictions(self.base, step.before, step.timestep, self.moving)[0]
        return torch.nn.functional.mse_loss(self.trajectory.moved(self._combined(moving, fixed), step), target[step.end])

    def _training_loss(self, noise: Tensor, timestep: Tensor) -> Tensor:
        """Mean squared error of the prediction: of the source embedding alone, or with guidance if the null is optimised."""
        clean = self.encoded.clean
        latents, target = self.base.noised(clean, noise, timestep), self.base.target(clean, noise, timestep)
        predicted = predictions(self.base, latents, int(timestep), self.moving)[0]
        if self.plan.moving == "null":
            with torch.no_grad():
                fixed = predictions(self.base, latents, int(timestep), self.fixed)[0]
            predicted = self._combined(predicted, fixed)
        return torch.nn.functional.mse_loss(predicted, target)

    def _guided(self, latents: Tensor, step: Step) -> Tensor:
        """The guided prediction with the embedding as it is now, in one call of the denoiser."""
        return self._combined(*predictions(self.base, latents, step.timestep, self._found(), self.fixed))

    def _combined(self, moving: Tensor, fixed: Tensor) -> Tensor:
        null, source = (moving, fixed) if self.plan.moving == "null" else (fixed, moving)
        return null + self.config.guidance_scale * (source - null)
