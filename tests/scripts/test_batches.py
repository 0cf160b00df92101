"""The batches of the U-Net's training, and their loss."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from critters_batches import DEVIATION_WEIGHT, Batch, Batches, loss
from critters_lessons import GROUP, Edits
from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from imagic_lora.bases.loading.known import CRITTERS

WORDS = CLIPTokenizer.from_pretrained(CRITTERS / "tokenizer")
SCHEDULER: Any = DDIMScheduler.from_pretrained(CRITTERS, subfolder="scheduler")
GROUPS, LOUD, EDITED, PAIRED = 8, 2, 4, 2


@pytest.fixture
def batch() -> Batch:
    """Zero latents: two loud groups, two usual ones, four of edits, the last two of which are pairs."""
    torch.manual_seed(0)
    size = (5 * GROUP, 8, 8, 8)
    edits = Edits(["a sitting dog"] * size[0], torch.full(size, -1.0), torch.ones(size), torch.ones(size[0], 3, 2))
    batches = Batches(torch.zeros(size), SCHEDULER, 0.1, GROUPS, LOUD, EDITED, PAIRED, loud_from=0.6, device="cpu")
    return batches.sample(np.random.default_rng(0), edits)


def by_group(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(0, (-1, GROUP))


def test_a_batch_begins_loud_and_ends_with_edits(batch: Batch) -> None:
    size, first = GROUPS * GROUP, (GROUPS - EDITED) * GROUP
    assert len(batch.captions) == 2 * size
    asked = [text == "a sitting dog" for text in batch.captions[:size]]
    assert asked == [False] * first + [True] * (size - first)
    assert batch.share[first:] == [0.0] * (size - first)
    assert by_group(batch.in_latents).all(1).tolist() == [True] * LOUD + [False] * (GROUPS - EDITED - LOUD) + [True] * EDITED
    assert int(batch.timesteps[: LOUD * GROUP].min()) >= 600
    moved = by_group(batch.moves.flatten(1).norm(dim=1) > 0)
    assert moved.all(1).tolist() == moved.any(1).tolist() == [False] * (GROUPS - EDITED) + [True] * EDITED
    assert batch.embedding_noise[-EDITED:].count_nonzero() == 0
    assert batch.embedding_noise[:-EDITED].count_nonzero() == GROUPS - EDITED
    assert batch.pairs
    assert len(batch.pairs.photo) == PAIRED * GROUP


def test_a_group_shares_its_noise_and_timestep(batch: Batch) -> None:
    """All latents are equal here, so they are equal after noising within a group, and different between groups."""
    for shared in (batch.timesteps, batch.noisy, batch.target):
        groups = by_group(shared)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(batch.noisy[:, 0, 0, 0].unique()) == GROUPS


def loss_of(batch: Batch, predicted: torch.Tensor) -> float:
    """The loss if the U-Net predicts this for the images and then for the photos of pairs."""
    parts = {
        "text": lambda tokens: SimpleNamespace(last_hidden_state=torch.zeros(len(tokens), 3, 2)),
        "unet": lambda x, t, states: SimpleNamespace(sample=predicted[: len(x)]),
    }
    return loss(parts, WORDS, SCHEDULER, batch).item()


@pytest.mark.parametrize("in_latents", [True, False])
def test_deviations_within_a_loud_group_have_more_weight(batch: Batch, in_latents: bool) -> None:
    """Errors of equal size, with the same sign in the whole group and with both signs."""
    batch.pairs, batch.in_latents = None, torch.full_like(batch.in_latents, in_latents)
    sides = torch.tensor([1.0, -1.0]).repeat(GROUPS * GROUP // 2)[:, None, None, None]
    assert loss_of(batch, batch.target) == pytest.approx(0, abs=1e-6)
    common, apart = loss_of(batch, batch.target + 1), loss_of(batch, batch.target + sides)
    assert apart / common == pytest.approx(DEVIATION_WEIGHT if in_latents else 1, rel=1e-4)


def test_the_loss_of_a_pair_depends_on_the_difference(batch: Batch) -> None:
    """An error that both predictions share does not count."""
    plain, pairs = batch.target.tensor_split([-PAIRED * GROUP])
    alike = torch.cat([plain, pairs + 3.0, torch.full_like(pairs, 3.0)])
    assert loss_of(batch, alike) == pytest.approx(0, abs=1e-6)
    assert loss_of(batch, torch.cat([plain, pairs + 3.0, torch.zeros_like(pairs)])) > 1
