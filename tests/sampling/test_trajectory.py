"""The loop over noise levels: its positions, and its agreement with diffusers in both directions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from common import PROMPT, each, slow_but
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.core.conditioning import Conditioning, concatenate
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.inversion import record_noise
from imagic_lora.sampling.trajectory import Predict, Step, Trajectory, guided, last, path, predictions

BASES = ("epsilon", "v_prediction", "sample", "trailing", "sdxl", "critters")


def prompts(base: Base) -> tuple[Conditioning, Conditioning]:
    """The conditionings of a prompt and of the empty prompt, with added conditions."""
    null = base.null()
    assert null is not None
    return tuple(base.with_added_conditions(one, base.resolution, base.resolution, 3.0) for one in (base.encode_prompt(PROMPT), null))  # pyright: ignore[reportReturnType]


def drawn(base: Base, seed: int = 0, batch: int = 1) -> Tensor:
    """Noise of the shape of the latents of an image."""
    side = base.resolution // base.architecture.vae_scale_factor
    channels = base.architecture.vae["latent_channels"]
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def by_pipeline(base: Base, scheduler: Any, latents: Tensor, steps: int, scale: float) -> Tensor:
    """The latents that diffusers' own pipeline returns."""
    prompt, null = prompts(base)
    kwargs = base.pipeline_kwargs(prompt, null if scale > 1 else None)
    sampling = {"num_inference_steps": steps, "guidance_scale": scale, "height": base.resolution, "width": base.resolution}
    return base.pipeline("text2image", scheduler)(latents=latents, output_type="latent", **kwargs, **sampling).images  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", slow_but([name for name in BASES if name not in ("critters", "trailing")], BASES))
def test_both_directions_are_those_of_diffusers(named: Any, name: str) -> None:
    """From noise with guidance, and back to noise without; the number of steps does not divide the number of timesteps."""
    base = named(name)
    (prompt, null), latents = prompts(base), drawn(base)
    trajectory = Trajectory(base, 7)
    sampled = path(trajectory.forwards(latents, guided(base, prompt, null, 3.0)))
    torch.testing.assert_close(sampled[7], by_pipeline(base, DDIMScheduler, latents, 7, 3.0), rtol=1e-5, atol=1e-5)
    inverted = path(trajectory.backwards(latents, guided(base, prompt)))
    if base.prediction_type != "v_prediction":  # see test_velocities_invert_as_noise_does
        torch.testing.assert_close(inverted[0], by_pipeline(base, DDIMInverseScheduler, latents, 7, 1.0), rtol=1e-5, atol=1e-5)
    assert list(sampled) == list(range(8))
    assert list(inverted) == list(range(7, -1, -1))


def perfect(base: Base, clean: Tensor, noise: Tensor) -> Predict:
    """The predictions of a denoiser that knows the photo and the noise; of a velocity, those that say this noise of the given latents."""

    def predict(latents: Tensor, step: Step) -> Tensor:
        if base.prediction_type != "v_prediction":
            return base.target(clean, noise, torch.tensor([step.timestep]))
        alpha = base.scheduler().alphas_cumprod[step.timestep]
        return (noise - (1 - alpha).sqrt() * latents) / alpha.sqrt()

    return predict


@each("name", ["epsilon", "sample", "trailing", "critters"])
def test_a_position_has_one_noise_level_in_both_directions(named: Any, name: str) -> None:
    """With perfect predictions the path is the photo with the same noise, at the level of each position by the base's own definition."""
    base = named(name)
    clean, noise = drawn(base, 1), drawn(base, 2)
    trajectory = Trajectory(base, 5)
    expected = {p: base.noised(clean, noise, torch.tensor([trajectory.timesteps[p]])) for p in range(5)}
    for position in range(5):
        torch.testing.assert_close(trajectory.noised(clean, noise, position), expected[position])
    assert torch.equal(trajectory.noised(clean, noise, 5), clean)
    start = expected[0]
    forwards = path(trajectory.forwards(start, perfect(base, clean, noise)))
    back = path(trajectory.backwards(expected[4], perfect(base, clean, noise), start=4))
    assert list(back) == [4, 3, 2, 1, 0]
    for position in range(5):
        torch.testing.assert_close(forwards[position], expected[position], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back[position], expected[position], rtol=1e-4, atol=1e-4)


def test_velocities_invert_as_noise_does(named: Any) -> None:
    """A denoiser that predicts the velocity ends at the noise of one that predicts the same noise, as diffusers inverts that one."""
    base, latents, (prompt, _) = named("v_prediction"), drawn(named("v_prediction")), prompts(named("v_prediction"))
    schedule = base.scheduler(DDIMScheduler)
    schedule.set_timesteps(7)
    inverse = DDIMInverseScheduler.from_config(schedule.config, prediction_type="epsilon")
    inverse.set_timesteps(7)
    expected = latents
    with torch.no_grad():
        for t in inverse.timesteps:
            noise = -schedule.get_velocity(expected, -predictions(base, expected, int(t), prompt)[0], t[None])
            expected = inverse.step(noise, int(t), expected).prev_sample
    found = last(latents, Trajectory(base, 7).backwards(latents, guided(base, prompt)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_says_where_it_is(named: Any) -> None:
    """The same index and timestep in both directions, with start and end exchanged; the next step starts where the last one ended."""
    base = named("epsilon")
    trajectory, latents = Trajectory(base, 4), drawn(base)
    predict = guided(base, prompts(base)[0])
    down, up = list(trajectory.forwards(latents, predict)), list(trajectory.backwards(latents, predict))
    assert trajectory.timesteps == [751, 501, 251, 1]
    assert [(s.index, s.timestep, s.start, s.end) for s in down] == [(0, 751, 0, 1), (1, 501, 1, 2), (2, 251, 2, 3), (3, 1, 3, 4)]
    assert [(s.index, s.timestep, s.start, s.end) for s in up] == [(3, 1, 4, 3), (2, 251, 3, 2), (1, 501, 2, 1), (0, 751, 1, 0)]
    for steps in (down, up):
        assert steps[0].before is latents
        assert all(after.before is before.latents for before, after in pairwise(steps))


def test_a_part_is_a_part_of_the_whole(named: Any) -> None:
    """Forwards and backwards from the middle to the middle, bit for bit."""
    base = named("epsilon")
    trajectory, latents, predict = Trajectory(base, 6), drawn(base), guided(base, prompts(base)[0])
    whole = path(trajectory.forwards(latents, predict))
    part = path(trajectory.forwards(whole[2], predict, start=2, end=5))
    assert list(part) == [2, 3, 4, 5]
    assert all(torch.equal(part[position], whole[position]) for position in part)
    whole = path(trajectory.backwards(latents, predict))
    part = path(trajectory.backwards(whole[5], predict, start=5, end=1))
    assert list(part) == [5, 4, 3, 2, 1]
    assert all(torch.equal(part[position], whole[position]) for position in part)


def test_the_body_of_the_loop_changes_the_latents(named: Any) -> None:
    """What it assigns is what the next prediction sees."""
    base = named("epsilon")
    seen: list[Tensor] = []

    def predict(latents: Tensor, step: Step) -> Tensor:
        seen.append(latents)
        return torch.zeros_like(latents)

    for step in Trajectory(base, 3).forwards(drawn(base), predict):
        step.latents = torch.full_like(step.latents, float(step.end))
    assert [float(latents.mean()) for latents in seen[1:]] == [1.0, 2.0]
    assert torch.equal(step.latents, torch.full_like(step.latents, 3.0))


@each("strength", [0.05, 0.3, 0.5, 0.68, 0.99, 1.0])
def test_strength_starts_where_diffusers_starts(named: Any, strength: float) -> None:
    """With the timesteps of the image-to-image pipeline."""
    trajectory = Trajectory(named("epsilon"), 23)
    pipe: Any = named("epsilon").pipeline("image2image", DDIMScheduler)
    pipe.scheduler.set_timesteps(23)
    timesteps, count = pipe.get_timesteps(23, strength, "cpu")
    assert trajectory.timesteps[trajectory.position(strength) :] == timesteps.tolist()
    assert 23 - trajectory.position(strength) == count


@each("strength", [0.0, 0.04, 1.05, -0.5])
def test_a_strength_without_a_step_is_an_error(named: Any, strength: float) -> None:
    """Also one above 1."""
    with pytest.raises(ImagicError, match=f"strength {strength:g} with 23 steps"):
        Trajectory(named("epsilon"), 23).position(strength)


@each("steps", [0, 1001])
def test_a_number_of_steps_that_the_schedule_lacks_is_an_error(named: Any, steps: int) -> None:
    """Its limit is that of the base."""
    with pytest.raises(ImagicError, match=rf"{steps} sampling steps\. Expected: 1 to 1000"):
        Trajectory(named("epsilon"), steps)


def test_a_stochastic_step_is_the_mean(named: Any, photo_file: Path) -> None:
    """With it and the recorded noise the path of edit-friendly inversion is followed, noise level by noise level."""
    base = named("epsilon")
    canvas = to_canvas(read_photo(photo_file).image, base.resolution, base.size_multiple)
    prompt, clean = prompts(base)[0], base.encode_image(canvas.pixels)
    start, *added = record_noise(base, canvas, clean, EditConfig(steps=6, ddim_eta=0.7), prompt, seed=3)
    draws = torch.randn(6, *clean.shape[1:], generator=torch.Generator().manual_seed(3))[:, None]
    trajectory = Trajectory(base, 6, ddim_eta=0.7)
    assert torch.equal(start, trajectory.noised(clean, draws[0], 0))
    for step in trajectory.forwards(start, guided(base, prompt)):
        step.latents = step.latents + added[step.index]
        expected = clean if step.end == 6 else trajectory.noised(clean, draws[step.end], step.end)
        torch.testing.assert_close(step.latents, expected, rtol=1e-5, atol=1e-5)


def test_guidance(named: Any) -> None:
    """The formula for any two conditionings; the passes at scale 1, and without a null, are those of the prompt alone."""
    base = named("sdxl")
    (prompt, null), latents = prompts(base), drawn(base, batch=2)
    step = Step(0, 501, 0, 1, latents, latents)
    with torch.no_grad():
        alone = {name: base.predict(latents, torch.tensor([501, 501]), one) for name, one in (("prompt", prompt), ("null", null))}
        sizes: list[int] = []
        hook = base.denoiser.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
        made = [guided(base, prompt, null, scale)(latents, step) for scale in (0.0, 0.5, 1.0, 7.5)] + [guided(base, prompt)(latents, step)]
        hook.remove()
    for prediction, scale in zip(made, (0.0, 0.5, 1.0, 7.5, 1.0), strict=True):
        expected = alone["null"] + scale * (alone["prompt"] - alone["null"])
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert sizes == [4, 4, 2, 4, 2]


def test_each_sample_may_have_a_conditioning_of_its_own(named: Any) -> None:
    """Two samples, two prompts and one null: each prediction is that of its sample alone."""
    base = named("sdxl")
    (prompt, null), latents = prompts(base), drawn(base, batch=2)
    other = base.with_added_conditions(base.encode_prompt("a dog"), 32, 32, 3.0)
    with torch.no_grad():
        two, one = predictions(base, latents, 501, concatenate([prompt, other]), null)
        for index, conditioning in enumerate((prompt, other)):
            expected = predictions(base, latents[index : index + 1], 501, conditioning, null)
            torch.testing.assert_close(two[index : index + 1], expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one[index : index + 1], expected[1], rtol=1e-4, atol=1e-5)


def test_loops_keep_no_graph_and_steps_may_have_gradients(named: Any) -> None:
    """What is optimised inside a step gets the gradient through the scheduler's step."""
    base = named("epsilon")
    null = prompts(base)[1]
    trained = null.tokens.clone().requires_grad_()
    moving = Conditioning(trained)
    trajectory = Trajectory(base, 3)
    (step, *_) = trajectory.forwards(drawn(base), guided(base, moving))
    assert not step.latents.requires_grad
    with torch.enable_grad():
        trajectory.moved(guided(base, moving)(step.before, step), step).square().mean().backward()
    assert trained.grad is not None
    assert trained.grad.abs().max() > 0
