"""Adafactor: against transformers' own, against the paper's formula in float64, its states on disk and in the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import each, opened
from test_optimizers import INSIDE, STOCHASTIC, tuning
from torch import Tensor
from torch.nn import Parameter
from transformers.optimization import Adafactor as Reference

from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.optimizer_states import state_bytes
from imagic_lora.training.updating.adafactor import Adafactor

FACTORED = {"optimizer": "adafactor"}


def gradients(shape: tuple[int, ...], steps: int, size: float = 1.0) -> list[Tensor]:
    """Normal numbers whose rows differ in size, as those of layers do."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator) + 0.1
    return [size * rows * torch.randn(shape, generator=generator) for _ in range(steps)]


@each("size", [1e-6, 1.0, 1e4])
@each("shape", [(7,), (1,), (5, 9), (1, 64), (4, 3, 3, 3)])
def test_it_takes_the_steps_of_transformers(shape: tuple[int, ...], size: float) -> None:
    """Twelve of them, in fp32, with the relative step off; a convolution as the matrix that it is to matrix products."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own, other = Parameter(start.clone()), Parameter(start.flatten(1).clone() if len(shape) > 1 else start.clone())
    ours = Adafactor([own], 1e-2)
    theirs = Reference([other], lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)
    for gradient in gradients(shape, 12, size):
        own.grad, other.grad = gradient.clone(), gradient.reshape(other.shape).clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(own.reshape(other.shape), other, rtol=2e-5, atol=1e-6)


def test_two_steps_by_the_formula() -> None:
    """Algorithm 4 of arXiv 1804.04235 in float64: factored moments, bias in the decay, clipped update."""
    first, second = (gradient.double() for gradient in gradients((6, 4), 2))
    second *= 30  # large after a small one, so that the update is clipped
    weight = Parameter(torch.zeros(6, 4))
    optimizer, expected = Adafactor([weight], 0.1), torch.zeros(6, 4, dtype=torch.float64)
    rows, columns = torch.zeros(6).double(), torch.zeros(4).double()
    clipped = []
    for k, gradient in enumerate((first, second), 1):
        weight.grad = gradient.float()
        optimizer.step()
        decay = 1 - k**-0.8
        rows = decay * rows + (1 - decay) * (gradient**2).sum(1)
        columns = decay * columns + (1 - decay) * (gradient**2).sum(0)
        update = gradient / (rows[:, None] * columns / rows.sum()).sqrt()
        size = update.square().mean().sqrt().item()
        clipped.append(size > 1.01)
        expected -= 0.1 * update / max(1.0, size)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert clipped[1]


@each("memory", [INSIDE, STOCHASTIC, STOCHASTIC | INSIDE])
def test_a_stage_trains_and_its_states_have_the_planned_size(folder: Path, memory: dict[str, object]) -> None:
    """Every weight moves, and the states but the counter have the bytes of the plan."""
    with tuning(folder, **FACTORED, **memory) as stage:
        before = {name: value.detach().clone() for name, value in stage.trainables.items()}
        shapes = {name: tuple(value.shape) for name, value in stage.trainables.items()}
        assert {len(shape) for shape in shapes.values()} == {1, 2, 4}
        stage.step(0)
        stage.check()
        moved = [name for name, value in stage.trainables.items() if not torch.equal(value, before[name])]
        assert len(moved) > 0.99 * len(before)
        held = {name: value.nbytes for name, value in stage.updates.state_dict().items() if not name.endswith("/step")}
    for name, shape in shapes.items():
        own = sum(size for state, size in held.items() if state.rpartition("/")[0] == name)
        assert own == state_bytes("adafactor", *shape)
    assert sum(held.values()) < 0.15 * sum(value.numel() * 4 for value in before.values())


def test_stage_1_uses_adam(folder: Path) -> None:
    """Its first step moves each number by the learning rate, which Adafactor's does not."""
    from imagic_lora.core.config import EmbedConfig
    from imagic_lora.core.runtime import Processes
    from imagic_lora.training.embed import embed_stage

    base = opened(folder, **FACTORED)
    target = base.encode_prompt("a cat")
    stage = embed_stage(base, torch.randn(1, 4, 4, 4), target, EmbedConfig(steps=1, learning_rate=0.01), 0, Processes())
    stage.step(0)
    assert "tokens/exp_avg" in stage.updates.state_dict()
    moved = (stage.trainables["tokens"].detach() - target.tokens).abs()
    assert moved.median().item() == pytest.approx(0.01, rel=0.01)


def test_a_state_of_another_optimizer_is_refused(folder: Path) -> None:
    """By the name of the weight."""
    with tuning(folder, optimizer="adam") as stage:
        stage.step(0)
        state = {name: value.clone() for name, value in stage.state_dict().items()}
    with tuning(folder, **FACTORED) as stage, pytest.raises(ImagicError, match="the saved optimizer states of"):
        stage.load_state_dict(state)


def test_mode_embedding_has_no_use_for_it() -> None:
    """It has no stage 2."""
    with pytest.raises(ImagicError, match="--optimizer"):
        resolve({"tune": {"mode": "embedding"}, "memory": {"optimizer": "adafactor"}}, {}, {})
