"""Captions and edits in the training of the embedded base's U-Net."""

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import critters_lessons
import numpy as np
import pytest
import torch
from critters_lessons import EDITS, EDITS_FROM, GROUP, SAMPLER_STEPS, Edits, caption_pairs, changed, difference_shares, neighbour, tokens
from diffusers import DDIMScheduler, StableDiffusionPipeline

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import ATTRIBUTES, longest_caption, scene_at
from imagic_lora.sampling.inversion import NoiseRecorder, NoiseReplayer

HEADS = range(0, 40 * GROUP, GROUP)


def differing(index: int) -> set[str]:
    """Names of the fields in which a member of a group differs from the first."""
    one, first = neighbour(index), neighbour(index - index % GROUP)
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(first, field.name)}


def test_neighbours_differ_in_one_or_two_factors_of_the_identity() -> None:
    """The first is the training scene itself; over many groups every factor is moved."""
    moved: set[str] = set()
    for head in HEADS:
        assert neighbour(head) == scene_at("train", head // GROUP)
        for index in range(head + 1, head + GROUP):
            names = differing(index)
            assert 1 <= len(names) <= 2
            moved |= names
    assert moved == {"shade", "size", "x", "y", "spots", "sun", "horizon", "tint", "facing"}


def test_captions_of_a_loud_group_name_everything_and_the_larger_share_is_true() -> None:
    """A second caption names one attribute: with a share above 0.5 if it is true of the image, and below 0.5 if it is not."""
    indices = np.arange(60 * GROUP)
    captions, shares = caption_pairs(indices, [True] * len(indices), random.Random(0))
    first, second = captions[: len(indices)], captions[len(indices) :]
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


def test_some_of_the_other_groups_have_empty_captions() -> None:
    """All images of a group or none; classifier-free guidance needs the empty prompt."""
    indices = np.arange(100 * GROUP)
    captions, shares = caption_pairs(indices, [False] * len(indices), random.Random(1))
    silent = np.array([not text for text in captions[: len(indices)]]).reshape(-1, GROUP)
    assert np.array_equal(silent.all(1), silent.any(1))
    assert 2 <= silent.all(1).sum() <= 25
    assert 0 < np.mean(shares) < 0.5


def edits() -> Edits:
    """Edits from all -1 to all 1, whose embeddings have moved by 1."""
    size = (EDITS, 8, 8, 8)
    return Edits(["a sitting dog"] * EDITS, torch.full(size, -1.0), torch.ones(size), torch.ones(EDITS, 3, 2))


def test_mixed_edits_show_the_image_that_belongs_to_their_eta() -> None:
    """The image after the edit from an eta of 0.55 on, the one before below 0.4; equal within a group."""
    torch.manual_seed(0)
    groups = 400
    prompts, latents, times, moves = edits().mixed(np.random.default_rng(0), groups)
    assert (len(prompts), latents.shape, times.shape, moves.shape) == (
        groups * GROUP,
        (groups * GROUP, 8, 8, 8),
        (groups * GROUP,),
        (groups * GROUP, 3, 2),
    )
    eta, happened = 1 - moves[:, 0, 0], latents[:, 0, 0, 0] == 1
    assert bool((eta[happened] >= 0.55).all())
    assert bool((eta[~happened] <= 0.4).all())
    assert 0.55 < happened.float().mean() < 0.75
    assert 0.6 < ((eta > 0.66) & (eta < 0.74))[happened].float().mean() < 0.9
    assert 0.6 < ((eta > 0.31) & (eta < 0.39))[~happened].float().mean() < 0.9
    assert times.min() >= EDITS_FROM
    for whole in (eta, times, happened):
        assert bool((whole.view(groups, GROUP) == whole.view(groups, GROUP)[:, :1]).all())


def test_an_edit_follows_the_difference_shares() -> None:
    """With the samplers of the package, if the predictions differ by exactly the edit at every step."""
    scheduler: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
    timesteps, share = difference_shares(scheduler)
    photo, apart = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    along: Any = NoiseRecorder.from_config(scheduler.config)
    back: Any = NoiseReplayer.from_config(scheduler.config)
    for path in (along, back):
        path.set_timesteps(SAMPLER_STEPS)
        assert torch.equal(path.timesteps, timesteps)

    def noise_in(x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        known = scheduler.alphas_cumprod[t]
        return (x - known.sqrt() * clean) / (1 - known).sqrt()

    draws = torch.randn(SAMPLER_STEPS, *photo.shape, generator=torch.Generator().manual_seed(1))
    along.path = torch.stack([*(along.add_noise(photo, one, t[None]) for one, t in zip(draws, timesteps, strict=True)), photo])
    along.added = []
    for x, t in zip(along.path, timesteps, strict=False):
        along.step(noise_in(x, 0.3 * photo, t), t, x, eta=1.0)
    back.added, x = along.added, along.path[0]
    for k, t in enumerate(timesteps):
        assert torch.allclose(x, along.path[k] + share[k] * apart, atol=1e-4)
        (x,) = back.step(noise_in(x, 0.3 * photo + apart, t), t, x, eta=1.0)
    assert torch.allclose(x, photo + apart, atol=1e-2)


def test_the_target_of_a_pair_is_the_difference() -> None:
    """Predictions that match the targets give clean latents that differ by the edit; timestep and eta are equal within a group."""
    torch.manual_seed(0)
    scheduler: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
    groups = 100
    noise = torch.randn(groups, 8, 8, 8).repeat_interleave(GROUP, 0)
    pairs = edits().pairs(np.random.default_rng(0), noise, scheduler)
    known = scheduler.alphas_cumprod[pairs.timesteps][:, None, None, None]
    clean = (pairs.edit - pairs.photo - (1 - known).sqrt() * pairs.difference) / known.sqrt()
    assert torch.allclose(clean, torch.full_like(clean, 2.0), atol=1e-3)  # from -1 to 1
    assert torch.allclose(pairs.photo, scheduler.add_noise(torch.full_like(noise, -1.0), noise, pairs.timesteps))
    eta, of_photo = (1 - moves[:, 0, 0] for moves in (pairs.moves, pairs.photo_moves))
    assert bool((eta >= 0.55).all())
    assert bool((of_photo <= 0.4).all())
    for whole in (eta, of_photo, pairs.timesteps):
        assert bool((whole.view(groups, GROUP) == whole.view(groups, GROUP)[:, :1]).all())


def test_optimised_embeddings_describe_the_image_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, whose cache once kept the embeddings of the first step."""
    monkeypatch.setattr(critters_lessons, "EDITS", 2 * GROUP)
    pipe: Any = StableDiffusionPipeline.from_pretrained(CRITTERS, dtype=torch.float32)
    parts = torch.nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        made = Edits.create(parts, pipe.tokenizer, pipe.vae, pipe.scheduler, np.random.default_rng(0), 200)
    noise, at = torch.randn(made.before.shape, generator=torch.Generator().manual_seed(1)), torch.full((len(made),), 700)
    noised = pipe.scheduler.add_noise(made.before, noise, at)

    def error(embedding: torch.Tensor) -> float:
        with torch.no_grad():
            return (pipe.unet(noised, at, embedding).sample - noise).square().mean().item()

    start = pipe.text_encoder(tokens(pipe.tokenizer, made.prompts, "cpu")).last_hidden_state
    assert error(start + made.moves) < 0.5 * error(start)


def test_a_changed_scene_differs_in_one_attribute() -> None:
    """In half of the cases the pose."""
    names = []
    for k in range(200):
        scene = scene_at("train", k)
        other, name = changed(scene, random.Random(k))
        assert getattr(other, name) != getattr(scene, name)
        assert replace(other, **{name: getattr(scene, name)}) == scene
        names.append(name)
    assert 70 < names.count("pose") < 130


def test_edits_are_kept_in_a_file(tmp_path: Path) -> None:
    """A resumed run continues with all edits that were created, and draws from all of them."""
    path = tmp_path / "edits.pt"
    first, second = (replace(edits(), prompts=[f"{k}"] * EDITS) for k in range(2))
    begun = Edits.load(path)
    assert len(begun) == 0
    begun.add(first, path)
    begun.add(second, path)
    again = Edits.load(path)
    assert again.prompts == first.prompts + second.prompts
    for name in ("before", "after", "moves"):
        assert torch.equal(getattr(again, name), torch.cat([getattr(first, name), getattr(second, name)]))
    torch.manual_seed(0)
    assert set(again.mixed(np.random.default_rng(0), 40)[0]) == {"0", "1"}
