"""What the U-Net of the embedded base is shown and told in its training."""

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import critters_lessons
import numpy as np
import pytest
import torch
from critters_lessons import EDITS, EDITS_FROM, GROUP, WAY_STEPS, Edits, changed, gone, neighbour, spoken, tokens
from diffusers import DDIMScheduler, StableDiffusionPipeline

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import ATTRIBUTES, longest_caption, scene_at
from imagic_lora.sampling.inversion import NoiseRecorder, NoiseReplayer

HEADS = range(0, 40 * GROUP, GROUP)


def differing(index: int) -> set[str]:
    """Names of what sets a member of a group apart from its first."""
    one, first = neighbour(index), neighbour(index - index % GROUP)
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(first, field.name)}


def test_neighbours_differ_in_one_or_two_factors_of_the_identity() -> None:
    """The first is the training scene itself; over many groups every factor is moved."""
    seen: set[str] = set()
    for head in HEADS:
        assert neighbour(head) == scene_at("train", head // GROUP)
        for index in range(head + 1, head + GROUP):
            names = differing(index)
            assert 1 <= len(names) <= 2
            seen |= names
    assert seen == {"shade", "size", "x", "y", "spots", "sun", "horizon", "tint", "facing"}


def test_a_loud_group_is_told_all_and_the_larger_share_is_true() -> None:
    """A second caption names one attribute: the truth with more than half, or, of a scene that is not shown, less than half."""
    indices = np.arange(60 * GROUP)
    told, shares = spoken(indices, [True] * len(indices), random.Random(0))
    first, second = told[: len(indices)], told[len(indices) :]
    kinds = {"whole": 0, "happened": 0, "not yet": 0}
    for index, one, other, share in zip(indices, first, second, shares, strict=True):
        scene = neighbour(int(index))
        if share == 0 and not other:
            assert one == longest_caption(scene)
            kinds["whole"] += 1
        elif share >= 0.5:
            before = {longest_caption(scene.edited(**{name: value})) for name, values in ATTRIBUTES.items() for value in values}
            assert one in before - {longest_caption(scene)}
            kinds["happened"] += 1
        else:
            assert one == longest_caption(scene)
            kinds["not yet"] += 1
    assert min(kinds.values()) >= 4 * GROUP
    assert kinds["happened"] > kinds["not yet"]


def test_of_the_others_some_are_told_nothing() -> None:
    """All of a group or none: guidance needs the empty prompt."""
    indices = np.arange(100 * GROUP)
    told, shares = spoken(indices, [False] * len(indices), random.Random(1))
    silent = np.array([not text for text in told[: len(indices)]]).reshape(-1, GROUP)
    assert np.array_equal(silent.all(1), silent.any(1))
    assert 2 <= silent.all(1).sum() <= 25
    assert 0 < np.mean(shares) < 0.5


def edits() -> Edits:
    """Edits from all -1 to all 1, whose embeddings have moved by 1."""
    size = (EDITS, 8, 8, 8)
    return Edits(["a sitting dog"] * EDITS, torch.full(size, -1.0), torch.ones(size), torch.ones(EDITS, 3, 2))


def test_mixed_edits_are_seen_from_where_they_set_in() -> None:
    """Above an eta of 0.55 the picture after, below 0.4 the one before; all of a group alike."""
    torch.manual_seed(0)
    groups = 400
    told, seen, times, moves = edits().mixed(np.random.default_rng(0), groups)
    assert (len(told), seen.shape, times.shape, moves.shape) == (
        groups * GROUP,
        (groups * GROUP, 8, 8, 8),
        (groups * GROUP,),
        (groups * GROUP, 3, 2),
    )
    eta, happened = 1 - moves[:, 0, 0], seen[:, 0, 0, 0] == 1
    assert bool((eta[happened] >= 0.55).all())
    assert bool((eta[~happened] <= 0.4).all())
    assert 0.55 < happened.float().mean() < 0.75
    assert 0.6 < ((eta > 0.66) & (eta < 0.74))[happened].float().mean() < 0.9
    assert 0.6 < ((eta > 0.31) & (eta < 0.39))[~happened].float().mean() < 0.9
    assert times.min() >= EDITS_FROM
    for whole in (eta, times, happened):
        assert bool((whole.view(groups, GROUP) == whole.view(groups, GROUP)[:, :1]).all())


def test_an_edit_goes_as_far_as_the_way_says() -> None:
    """By the samplers of the product: if the predictions differ by the edit's difference to the photo at every step."""
    scheduler: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
    timesteps, share = gone(scheduler)
    photo, apart = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    along: Any = NoiseRecorder.from_config(scheduler.config)
    back: Any = NoiseReplayer.from_config(scheduler.config)
    for path in (along, back):
        path.set_timesteps(WAY_STEPS)
        assert torch.equal(path.timesteps, timesteps)

    def noise_in(x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        known = scheduler.alphas_cumprod[t]
        return (x - known.sqrt() * clean) / (1 - known).sqrt()

    draws = torch.randn(WAY_STEPS, *photo.shape, generator=torch.Generator().manual_seed(1))
    along.path = torch.stack([*(along.add_noise(photo, one, t[None]) for one, t in zip(draws, timesteps, strict=True)), photo])
    along.added = []
    for x, t in zip(along.path, timesteps, strict=False):
        along.step(noise_in(x, 0.3 * photo, t), t, x, eta=1.0)
    back.added, x = along.added, along.path[0]
    for k, t in enumerate(timesteps):
        assert torch.allclose(x, along.path[k] + share[k] * apart, atol=1e-4)
        (x,) = back.step(noise_in(x, 0.3 * photo + apart, t), t, x, eta=1.0)
    assert torch.allclose(x, photo + apart, atol=1e-2)


def test_on_the_way_the_difference_is_to_be_predicted() -> None:
    """What is asked of the two predictions makes clean latents that differ by the edit; of a group all are as far."""
    torch.manual_seed(0)
    scheduler: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
    groups = 100
    noise = torch.randn(groups, 8, 8, 8).repeat_interleave(GROUP, 0)
    ways = edits().ways(np.random.default_rng(0), noise, scheduler)
    known = scheduler.alphas_cumprod[ways.timesteps][:, None, None, None]
    clean = (ways.edit - ways.photo - (1 - known).sqrt() * ways.difference) / known.sqrt()
    assert torch.allclose(clean, torch.full_like(clean, 2.0), atol=1e-3)  # from -1 to 1
    assert torch.allclose(ways.photo, scheduler.add_noise(torch.full_like(noise, -1.0), noise, ways.timesteps))
    eta, of_photo = (1 - moves[:, 0, 0] for moves in (ways.moves, ways.photo_moves))
    assert bool((eta >= 0.55).all())
    assert bool((of_photo <= 0.4).all())
    for whole in (eta, of_photo, ways.timesteps):
        assert bool((whole.view(groups, GROUP) == whole.view(groups, GROUP)[:, :1]).all())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_optimised_embeddings_tell_of_the_picture_before(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype) -> None:
    """In the autocast of the training as well, which keeps its casts: it used to optimise against the embeddings of the first step."""
    monkeypatch.setattr(critters_lessons, "EDITS", 2 * GROUP)
    pipe: Any = StableDiffusionPipeline.from_pretrained(CRITTERS, dtype=torch.float32)
    parts = torch.nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    torch.manual_seed(0)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        made = Edits.made(parts, pipe.tokenizer, pipe.vae, pipe.scheduler, np.random.default_rng(0), 400)
    noise, at = torch.randn(made.before.shape, generator=torch.Generator().manual_seed(1)), torch.full((len(made),), 700)
    noised = pipe.scheduler.add_noise(made.before, noise, at)

    def error(told: torch.Tensor) -> float:
        with torch.no_grad():
            return (pipe.unet(noised, at, told).sample - noise).square().mean().item()

    start = pipe.text_encoder(tokens(pipe.tokenizer, made.sentences, "cpu")).last_hidden_state
    assert error(start + made.moves) < 0.5 * error(start)


def test_a_changed_scene_differs_in_one_attribute() -> None:
    """Half of them in the pose."""
    names = []
    for k in range(200):
        scene = scene_at("train", k)
        other, name = changed(scene, random.Random(k))
        assert getattr(other, name) != getattr(scene, name)
        assert replace(other, **{name: getattr(scene, name)}) == scene
        names.append(name)
    assert 70 < names.count("pose") < 130


def test_edits_are_kept_in_a_file(tmp_path: Path) -> None:
    """A run that is resumed goes on with all that were made, and draws from all."""
    path = tmp_path / "edits.pt"
    first, second = (replace(edits(), sentences=[f"{k}"] * EDITS) for k in range(2))
    begun = Edits.kept(path)
    assert len(begun) == 0
    begun.add(first, path)
    begun.add(second, path)
    again = Edits.kept(path)
    assert again.sentences == first.sentences + second.sentences
    for name in ("before", "after", "moves"):
        assert torch.equal(getattr(again, name), torch.cat([getattr(first, name), getattr(second, name)]))
    torch.manual_seed(0)
    assert set(again.mixed(np.random.default_rng(0), 40)[0]) == {"0", "1"}
