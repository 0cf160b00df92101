"""What the U-Net of the embedded base is shown and told in its training."""

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from critters_lessons import APART_LEAST, EDITS, EDITS_FROM, GROUP, Edits, apart, changed, neighbour, spoken, sunny
from diffusers import DDIMScheduler

from imagic_lora.critters import ATTRIBUTES, longest_caption, scene_at

HEADS = range(0, 40 * GROUP, GROUP)


def differing(index: int, of: object) -> set[str]:
    """Names of what sets a member of a group apart from its first."""
    one, first = of(index), of(index - index % GROUP)  # pyright: ignore[reportCallIssue]
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(first, field.name)}


def test_neighbours_differ_in_one_or_two_factors_of_the_identity() -> None:
    """The first is the training scene itself; over many groups every factor is moved."""
    seen: set[str] = set()
    for head in HEADS:
        assert neighbour(head) == scene_at("train", head // GROUP)
        for index in range(head + 1, head + GROUP):
            names = differing(index, neighbour)
            assert 1 <= len(names) <= 2
            seen |= names
    assert seen == {"shade", "size", "x", "y", "spots", "sun", "horizon", "tint", "facing"}


def test_sunny_groups_differ_in_the_place_of_the_sun_alone() -> None:
    """A quarter of the sky apart, so that each of the four words for it is said once."""
    for head in HEADS:
        assert all(differing(index, sunny) == {"sun"} for index in range(head + 1, head + GROUP))
        places = sorted(sunny(index).sun for index in range(head, head + GROUP))
        assert np.diff(places) == pytest.approx([0.25] * 3)
        assert len({longest_caption(sunny(index)) for index in range(head, head + GROUP)}) == GROUP


def test_errors_count_apart_only_where_a_group_disagrees() -> None:
    """An error that all share is none; the same one counts more where the latents are nearer to each other, down to a least weight."""
    shared = torch.randn(1, 1, 8, 8, 8).expand(1, GROUP, -1, -1, -1)
    near, far = (torch.zeros(1, GROUP, 8, 8, 8) for _ in range(2))
    near[:, 1], far[:, 1] = 0.1, 10.0
    assert apart(shared, near).item() == pytest.approx(0, abs=1e-6)
    errors = torch.zeros(1, GROUP, 8, 8, 8)
    errors[:, 1] = 0.5
    assert apart(errors, far).item() == pytest.approx(0.25 * APART_LEAST / GROUP)
    assert apart(errors, near).item() == pytest.approx(0.25 * 0.9 / (0.01 + 0.05) / GROUP)
    assert apart(2 * errors, far).item() == pytest.approx(4 * apart(errors, far).item())


def test_a_loud_group_is_told_all_and_the_larger_share_is_true() -> None:
    """A second caption names one attribute: the truth with more than half, or, of a scene that is not shown, less than half."""
    indices = np.arange(60 * GROUP)
    told, shares = spoken(indices, [True] * len(indices), random.Random(0))
    first, second = told[: len(indices)], told[len(indices) :]
    kinds = {"whole": 0, "happened": 0, "not yet": 0}
    for index, one, other, share in zip(indices, first, second, shares, strict=True):
        scene = neighbour(int(index))
        before = [scene.edited(**{name: value}) for name, values in ATTRIBUTES.items() for value in values]
        if share == 0 and not other:
            assert one == longest_caption(scene)
            kinds["whole"] += 1
        elif share >= 0.5:
            assert one in {longest_caption(some) for some in before} - {longest_caption(scene)}
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


def test_mixed_edits_are_seen_from_where_they_set_in_and_on_the_way_there() -> None:
    """Above an eta of 0.55 the picture after, below 0.4 the one before; a part of the way to it is left only where noise rules."""
    torch.manual_seed(0)
    groups = 400
    told, seen, times, moves, behind = edits().mixed(np.random.default_rng(0), groups, DDIMScheduler(beta_schedule="scaled_linear"))
    assert (len(told), seen.shape, times.shape, moves.shape) == (groups * GROUP, behind.shape, (groups * GROUP,), (groups * GROUP, 3, 2))
    eta, happened, left = 1 - moves[:, 0, 0], seen[:, 0, 0, 0] == 1, behind[:, 0, 0, 0] / -2
    assert bool((eta[happened] >= 0.55).all())
    assert bool((eta[~happened] <= 0.4).all())
    assert 0.65 < happened.float().mean() < 0.85
    assert times.min() >= EDITS_FROM
    assert bool((left[~happened] == 0).all())
    on_the_way = happened & (left > 0)
    assert 0.35 < on_the_way.float().mean() / happened.float().mean() < 0.65
    assert left[on_the_way & (times > 0.98)].min() > 0.5
    assert left[on_the_way & (times < 0.5)].max() < 0.2
    for whole in (eta, times, left):  # the same in a group
        assert bool((whole.view(groups, GROUP) == whole.view(groups, GROUP)[:, :1]).all())


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
