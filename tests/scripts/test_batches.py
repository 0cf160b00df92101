"""The batches of the U-Net's training, and their loss."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from critters_batches import APART, Batch, Batches, loss
from critters_lessons import GROUP, Edits
from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from imagic_lora.bases.loading.known import CRITTERS

WORDS = CLIPTokenizer.from_pretrained(CRITTERS / "tokenizer")
SCHEDULER: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
GROUPS, LOUD, EDITED, WAYS = 8, 2, 4, 2


@pytest.fixture
def batch() -> Batch:
    """Pictures of nothing: two loud groups, two usual ones, four of edits, the last two on their way."""
    torch.manual_seed(0)
    size = (5 * GROUP, 8, 8, 8)
    edits = Edits(["a sitting dog"] * size[0], torch.full(size, -1.0), torch.ones(size), torch.ones(size[0], 3, 2))
    batches = Batches(torch.zeros(size), SCHEDULER, 0.1, GROUPS, LOUD, EDITED, WAYS, loud_from=0.6, device="cpu")
    return batches.drawn(np.random.default_rng(0), edits)


def by_group(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(0, (-1, GROUP))


def test_a_batch_begins_loud_and_ends_with_edits(batch: Batch) -> None:
    size, first = GROUPS * GROUP, (GROUPS - EDITED) * GROUP
    assert len(batch.told) == 2 * size
    asked = [text == "a sitting dog" for text in batch.told[:size]]
    assert asked == [False] * first + [True] * (size - first)
    assert batch.share[first:] == [0.0] * (size - first)
    assert by_group(batch.aloud).all(1).tolist() == [True] * LOUD + [False] * (GROUPS - EDITED - LOUD) + [True] * EDITED
    assert int(batch.timesteps[: LOUD * GROUP].min()) >= 600
    moved = by_group(batch.moves.flatten(1).norm(dim=1) > 0)
    assert moved.all(1).tolist() == moved.any(1).tolist() == [False] * (GROUPS - EDITED) + [True] * EDITED
    assert batch.rough[-EDITED:].count_nonzero() == 0
    assert batch.rough[:-EDITED].count_nonzero() == GROUPS - EDITED
    assert batch.pairs
    assert len(batch.pairs.photo) == WAYS * GROUP


def test_a_group_shares_its_noise_and_timestep(batch: Batch) -> None:
    """So that pictures that are the same, as they all are here, come out the same; groups do not share theirs."""
    for shared in (batch.timesteps, batch.noisy, batch.target):
        groups = by_group(shared)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(batch.noisy[:, 0, 0, 0].unique()) == GROUPS


def loss_of(batch: Batch, predicted: torch.Tensor) -> float:
    """The loss where the U-Net predicts this, of pictures and then of the photos of pairs."""
    parts = {
        "text": lambda tokens: SimpleNamespace(last_hidden_state=torch.zeros(len(tokens), 3, 2)),
        "unet": lambda x, t, states: SimpleNamespace(sample=predicted[: len(x)]),
    }
    return loss(parts, WORDS, SCHEDULER, batch).item()


@pytest.mark.parametrize("aloud", [True, False])
def test_what_sets_a_loud_group_apart_weighs_more(batch: Batch, aloud: bool) -> None:
    """Errors of the same size, in one direction in all of a group, and in two."""
    batch.pairs, batch.aloud = None, torch.full_like(batch.aloud, aloud)
    sides = torch.tensor([1.0, -1.0]).repeat(GROUPS * GROUP // 2)[:, None, None, None]
    assert loss_of(batch, batch.target) == pytest.approx(0, abs=1e-6)
    common, apart = loss_of(batch, batch.target + 1), loss_of(batch, batch.target + sides)
    assert apart / common == pytest.approx(APART if aloud else 1, rel=1e-4)


def test_of_a_pair_the_difference_is_asked(batch: Batch) -> None:
    """What both predictions miss alike is no error."""
    plain, pairs = batch.target.tensor_split([-WAYS * GROUP])
    alike = torch.cat([plain, pairs + 3.0, torch.full_like(pairs, 3.0)])
    assert loss_of(batch, alike) == pytest.approx(0, abs=1e-6)
    assert loss_of(batch, torch.cat([plain, pairs + 3.0, torch.zeros_like(pairs)])) > 1
