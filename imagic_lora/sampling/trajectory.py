"""The one loop over noise levels, from noise to photo and back: DDIM on a diffusion, Euler's method on a flow.

Levels. A trajectory of ``N`` steps has ``N + 1`` *positions*. Position 0 has the most noise, position ``N`` is the clean end, and position
``p < N`` has the noise level of ``timesteps[p]``. Step ``i`` joins the positions ``i`` and ``i + 1`` in either direction:

    forwards   position i  ->  i + 1   DDIM step, prediction at timesteps[i] on the latents of position i
    backwards  position i + 1  ->  i   inverse step, prediction at timesteps[i] on the latents of position i + 1

On a flow the timestep is sigma, the share of noise, and a step is one of Euler's method along the velocity.
Both directions evaluate the denoiser at the timestep of the noisier end, as ``DDIMInverseScheduler`` and the code of null-text inversion
do. Noise and ``x_0`` mean the same at every level; a velocity belongs to one, so both directions convert it at the timestep of the
prediction. diffusers' inverse scheduler converts it at the level of the latents and loses the photo: 24.3 dB on critters, against 31.6 dB
(8 photos, 23 steps). A *path* maps positions to latents: ``path[p]`` of an inversion and of a sampling always have the same noise level.

Hooks. The loops are generators. A method changes the latents between two steps in the body of its ``for`` loop, by assigning
``step.latents``, and changes the prediction in the function that it passes as ``predict``::

    trajectory = Trajectory(base, steps=50)
    pivot = path(trajectory.backwards(clean, guided(base, source)))
    for step in trajectory.forwards(pivot[0], guided(base, target, null, 7.5)):
        step.latents = torch.lerp(pivot[step.end], step.latents, mask)
    edited = step.latents

The arithmetic of a step on a diffusion is that of diffusers' DDIMScheduler and, but for velocities, DDIMInverseScheduler. Latents are fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.errors import ImagicError
from .guidance import guided as combined

Path = dict[int, Tensor]
"""Latents ``[B, C, h, w]`` by position."""


@dataclass
class Step:
    """One step of a trajectory.

    Args:
        index: number of the step, in [0, N); it joins the positions ``index`` and ``index + 1``.
        timestep: timestep of the prediction: that of position ``index``, in both directions. On a flow it is sigma.
        start: position that the step starts from.
        end: position that the step leads to.
        before: latents at ``start``, ``[B, C, h, w]``.
        latents: latents at ``end`` once the step is done; the next step starts from them. A loop body may replace them.
    """

    index: int
    timestep: float
    start: int
    end: int
    before: Tensor
    latents: Tensor


Predict = Callable[[Tensor, Step], Tensor]
"""Returns the prediction of the denoiser for latents ``[B, C, h, w]`` at ``step.timestep``, of the type that the base predicts."""


class Levels(ABC):
    """The noise levels of a sampling, and the loops over them.

    Attributes:
        steps: number of steps ``N`` from position 0 to the clean end.
        timesteps: timestep of each position but the clean end, descending.
    """

    steps: int
    timesteps: Sequence[float]

    def position(self, strength: float) -> int:
        """Returns the position from which a share of the steps remains: ``N - int(N * strength)``, as in diffusers' image-to-image.

        Args:
            strength: share of the steps, in [0, 1]. 1 is position 0.

        Raises:
            ImagicError: no step remains.
        """
        remaining = int(self.steps * strength)
        if not 1 <= remaining <= self.steps:
            got = f"strength {strength:g} with {self.steps} steps"
            raise ImagicError(got, "strength * steps of at least 1, strength at most 1", "change the strength or the number of steps")
        return self.steps - remaining

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, position: int) -> Tensor:
        """Adds noise of the level of a position; the clean end returns ``clean``.

        Args:
            clean: latents ``x_0``, ``[B, C, h, w]``.
            noise: standard normal, the same shape.
            position: in [0, N].
        """

    @abstractmethod
    def moved(self, prediction: Tensor, step: Step) -> Tensor:
        """Returns the latents at ``step.end`` for a prediction on the latents ``step.before``. Gradients flow to both.

        Args:
            prediction: of the type that the base predicts, ``[B, C, h, w]``.
            step: the step; its ``latents`` are not read.
        """

    def forwards(self, latents: Tensor, predict: Predict, start: int = 0, end: int | None = None) -> Iterator[Step]:
        """Samples: from a position towards the clean end, without gradients.

        Args:
            latents: at position ``start``, ``[B, C, h, w]``.
            predict: returns the prediction of each step.
            start, end: first and last position; ``end`` None is the clean end.

        Yields:
            Each step after it is done. The latents that the loop body leaves in it are those that the next step starts from.
        """
        return self._walk(latents, predict, range(start, self.steps if end is None else end), backwards=False)

    def backwards(self, latents: Tensor, predict: Predict, start: int | None = None, end: int = 0) -> Iterator[Step]:
        """Inverts: from a position towards noise (arXiv 2010.02502, section 4.3), without gradients.

        Args:
            latents: at position ``start``, ``[B, C, h, w]``.
            predict: returns the prediction of each step.
            start, end: first and last position; ``start`` None is the clean end.

        Yields:
            As :meth:`forwards`; the indices of the steps descend.
        """
        return self._walk(latents, predict, reversed(range(end, self.steps if start is None else start)), backwards=True)

    def _walk(self, latents: Tensor, predict: Predict, indices: Iterable[int], backwards: bool) -> Iterator[Step]:
        for index in indices:
            step = Step(index, self.timesteps[index], index + backwards, index + (not backwards), latents, latents)
            with torch.no_grad():
                step.latents = self.moved(predict(latents, step), step)
            yield step
            latents = step.latents


class Trajectory(Levels):
    """The noise levels of DDIM on a base.

    Args:
        base: the base. Its noise schedule, prediction type and spacing of timesteps are used, and its denoiser is not.
        steps: number of steps ``N`` from position 0 to the clean end.
        ddim_eta: noise of a step forwards, 0 (DDIM) to 1 (DDPM). A step returns the mean of the next latents; the caller adds the noise.

    Raises:
        ImagicError: the noise schedule has less timesteps than ``steps``.
    """

    def __init__(self, base: Base, steps: int, ddim_eta: float = 0.0) -> None:
        self.steps, self.ddim_eta = steps, ddim_eta
        self._forward, self._inverse = base.scheduler(DDIMScheduler), base.scheduler(DDIMInverseScheduler)
        trained = self._forward.config.num_train_timesteps
        if not 1 <= steps <= trained:
            raise ImagicError(f"{steps} sampling steps", f"1 to {trained}, the timesteps of {base.name}", "change the number of steps")
        self._converts = base.prediction_type == "v_prediction"
        if self._converts:
            self._inverse.register_to_config(prediction_type="epsilon")
        for scheduler in (self._forward, self._inverse):
            scheduler.set_timesteps(steps)
        self.timesteps = [int(timestep) for timestep in self._forward.timesteps]

    def noised(self, clean: Tensor, noise: Tensor, position: int) -> Tensor:
        """``sqrt(a) x_0 + sqrt(1 - a) noise``."""
        if position == self.steps:
            return clean
        return self._forward.add_noise(clean, noise, torch.full((len(clean),), self.timesteps[position]))

    def moved(self, prediction: Tensor, step: Step) -> Tensor:
        if step.end < step.start:
            if self._converts:
                alpha = self._forward.alphas_cumprod[int(step.timestep)]
                prediction = alpha.sqrt() * prediction + (1 - alpha).sqrt() * step.before
            return self._inverse.step(prediction, step.timestep, step.before, return_dict=False)[0]
        no_noise = torch.zeros_like(step.before) if self.ddim_eta else None
        return self._forward.step(prediction, step.timestep, step.before, self.ddim_eta, variance_noise=no_noise, return_dict=False)[0]

    def coefficients(self, index: int) -> tuple[float, float]:
        """Returns ``a`` and ``b`` of a step forwards without noise: it is ``a z + b f`` for latents ``z`` and the prediction ``f``.

        Args:
            index: number of the step, in [0, N).

        Raises:
            ImagicError: the scheduler of the base clips the predicted image, so that its steps are not linear.
        """
        if self._forward.config.clip_sample or self._forward.config.thresholding:
            got, expected = "a scheduler that clips the predicted image", "clip_sample and thresholding false"
            raise ImagicError(got, expected, "choose another base, or DDIM inversion without fixed-point iterations")
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        timestep = self.timesteps[index]
        a, b = (float(self._forward.step(f, timestep, z, self.ddim_eta, variance_noise=zero)[0]) for z, f in ((one, zero), (zero, one)))
        return a, b


def path(steps: Iterable[Step]) -> Path:
    """Runs the steps and returns the latents at every position, the first one included.

    Args:
        steps: a running loop, of at least one step.
    """
    latents: Path = {}
    for step in steps:
        latents |= {step.start: step.before, step.end: step.latents}
    return latents


def last(latents: Tensor, steps: Iterable[Step]) -> Tensor:
    """Runs the steps and returns the latents after the last one.

    Args:
        latents: returned if there are no steps.
        steps: a running loop.
    """
    for step in steps:
        latents = step.latents
    return latents


def predictions(base: Base, latents: Tensor, timestep: float, *conditionings: Conditioning) -> tuple[Tensor, ...]:
    """Returns the predictions for the same latents at several conditionings, each ``[B, C, h, w]``, in one call of the denoiser.

    Args:
        base: the base.
        latents: ``[B, C, h, w]``.
        timestep: timestep of the latents, in [0, num_train_timesteps).
        conditionings: each with added conditions, of batch size ``B`` or 1.
    """
    batch, count = len(latents), len(conditionings)
    stacked = concatenate([conditioning.expand(batch) for conditioning in conditionings])
    timesteps = torch.full((batch * count,), timestep, device=latents.device)
    return base.predict(torch.cat([latents] * count), timesteps, stacked).to(latents.dtype).chunk(count)


def guided(base: Base, conditioning: Conditioning, null: Conditioning | None = None, scale: float = 1.0) -> Predict:
    """Returns the prediction with classifier-free guidance: ``n + scale * (c - n)`` for the predictions ``c`` and ``n``.

    Args:
        base: the base.
        conditioning: conditioning of ``c``, with added conditions, of the batch size of the latents or 1.
        null: conditioning of ``n``, usually the empty prompt; another prompt is a negative prompt. None turns guidance off.
        scale: guidance scale. 1 turns guidance off: the prediction is ``c`` and takes one pass for each sample, instead of two.
    """

    def predict(latents: Tensor, step: Step) -> Tensor:
        if null is None or scale == 1:
            return predictions(base, latents, step.timestep, conditioning)[0]
        without, with_prompt = predictions(base, latents, step.timestep, null, conditioning)
        return combined(with_prompt, without, scale)

    return predict
