"""Optimisers: one inside the backward pass against one after it, 8-bit states, what is not finite, bf16 weights that round at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from common import SimulatedProcess, each, opened, same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from imagic_lora.adapters.full import unfrozen
from imagic_lora.adapters.lora import attached
from imagic_lora.core.config import Mode, TuneConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import Processes, Runtime, resolve_runtime
from imagic_lora.training.stage import Stage, train
from imagic_lora.training.tune import tune_stage
from imagic_lora.training.updating import updates
from imagic_lora.training.updating.optimizers import build_optimizer
from imagic_lora.training.updating.updates import JointUpdates, PerParameterUpdates, build_updates, round_stochastically

INSIDE = {"optimizer_in_backward": True}
STOCHASTIC = {"dtype": "bf16", "master_weights": "bf16-stochastic"}
UNIT = 2.0**-7  # bf16 numbers from 1 to 2 are so far apart


@contextmanager
def tuning(folder: Path, mode: Mode = "full", seed: int = 0, processes: Processes | None = None, **memory) -> Iterator[Stage]:
    """A tuning stage on fixed latents of 4 x 4."""
    base = opened(folder, mode, **memory)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    lora = {"rank": 32, "targets": "attention+conv"} if mode == "lora" else {}
    config = TuneConfig.model_validate({"mode": mode, "steps": 3, "learning_rate": 0.01, "batch_size": 2} | lora)
    with unfrozen(base, restore=False) if mode == "full" else attached(base, config, 0) as parameters:
        yield tune_stage(base, latents, base.encode_prompt("a cat"), parameters, config, seed, processes or Processes())


def trained(stage: Stage) -> dict[str, Tensor]:
    """A copy of what a stage has come to."""
    return {name: value.detach().clone() for name, value in stage.trainables.items()}


def states(stage: Stage) -> dict[str, Tensor]:
    """A copy of the optimiser's states of every parameter, however many optimisers there are."""
    return {name: value.clone() for name, value in stage.updates.state_dict().items()}


def outcome(stage: Stage) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights and states at the end of a stage."""
    return [report.loss.item() for report in train(stage)], trained(stage), states(stage)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    """A hook that puts a value into a gradient."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return poison


def on_cpu(**memory) -> Runtime:
    """What these levers come to on the CPU."""
    return resolve_runtime(MemoryConfig.model_validate({"device": "cpu"} | memory))


@pytest.mark.parametrize(
    ("mode", "memory"),
    [
        ("full", {"optimizer": "adam"}),
        ("lora", {"optimizer": "adam8bit"}),
        pytest.param("full", {"gradient_checkpointing": True, "dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param("full", {"optimizer": "adafactor"}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora-8bit", "full-checkpointing-autocast", "full-adafactor"],
)
def test_inside_the_backward_pass_is_the_ordinary_loop(folder: Path, mode: Mode, memory: dict[str, Any]) -> None:
    """Losses, weights and states are the same bits after three steps."""
    with tuning(folder, mode, **memory) as stage:
        assert type(stage.updates) is JointUpdates
        before = trained(stage)
        losses, ordinary, kept = outcome(stage)
    with tuning(folder, mode, **memory, **INSIDE) as stage:
        assert type(stage.updates) is PerParameterUpdates
        assert same(trained(stage), before)
        found = outcome(stage)
    assert found[0] == losses
    assert same(found[1], ordinary)
    assert same(found[2], kept)
    assert all(not torch.equal(ordinary[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("mode", "memory"),
    [("full", {}), ("full", STOCHASTIC), ("lora", INSIDE)],
    ids=["after", "bf16", "lora-inside"],
)
def test_large_states_are_in_8_bits(folder: Path, mode: Mode, memory: dict[str, Any]) -> None:
    """uint8 from 4,096 elements on, fp32 below, one optimiser or many, whatever the weights are in."""
    with tuning(folder, mode, optimizer="adam8bit", **memory) as stage:
        stage.step(0)
        found = states(stage)
        for part in ("state1", "state2"):
            kinds = {(p.numel() >= 4096, found[f"{name}/{part}"].dtype) for name, p in stage.trainables.items()}
            assert kinds == {(True, torch.uint8), (False, torch.float32)}
        sizes = {name: p.numel() for name, p in stage.trainables.items()}
        assert all(found[f"{name}/state1"].numel() == size for name, size in sizes.items())


def test_8bit_states_of_fake_tensors_have_the_size_of_real_ones() -> None:
    """Byte for byte, the quantisation map that all tensors share left out."""
    sizes = [1, 4095, 4096, 4097, 10_000]

    def held(own: dict[str, Any]) -> int:
        shared = ("qmap1", "qmap2")
        return sum(value.nbytes for name, value in own.items() if isinstance(value, Tensor) and name not in shared)

    def stepped() -> list[int]:
        weights = [Parameter(torch.ones(size)) for size in sizes]
        optimizer = build_optimizer("adam8bit", weights, 0.01)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.step()
        return [held(optimizer.state[weight]) for weight in weights]

    with FakeTensorMode():
        fake = stepped()
    assert fake == stepped()


def test_no_two_gradients_are_held_inside_the_backward_pass(folder: Path) -> None:
    """When a gradient is complete it is the only one; the ordinary loop has all of them at the end."""
    most = {}
    for inside in (False, True):
        with tuning(folder, optimizer_in_backward=inside) as stage:
            held: list[int] = []
            everything = list(stage.trainables.values())

            def count(_: Tensor, everything: list[Parameter] = everything, held: list[int] = held) -> None:
                held.append(sum(weight.grad is not None for weight in everything))

            for weight in everything:  # these hooks run before the optimiser's own
                weight.register_post_accumulate_grad_hook(count)
            stage.step(0)
            assert len(held) == len(everything)
            assert all(p.grad is None for p in everything)
            most[inside] = max(held)
    assert most == {False: len(everything), True: 1}


def ordinary_backward(stage: Stage) -> None:
    """A backward pass that has nothing to do with the stage: it must leave weights alone and gradients in place."""
    before = trained(stage)
    torch.stack([weight.sum() for weight in stage.trainables.values()]).sum().backward()
    assert same(trained(stage), before)
    assert all(torch.equal(weight.grad, torch.ones_like(weight)) for weight in stage.trainables.values() if weight.grad is not None)
    assert all(weight.grad is not None for weight in stage.trainables.values())


def test_hooks_are_gone_after_a_step(folder: Path) -> None:
    """A later backward pass updates nothing."""
    with tuning(folder, **INSIDE) as stage:
        before = trained(stage)
        stage.step(0)
        assert not same(trained(stage), before)
        ordinary_backward(stage)


def test_hooks_are_gone_after_a_failed_backward_pass(folder: Path) -> None:
    """The exception comes through, and a later backward pass updates nothing."""
    with tuning(folder, **INSIDE) as stage:
        half = list(stage.trainables.values())[len(stage.trainables) // 2]

        def fail(gradient: Tensor) -> None:
            raise MemoryError("no room")

        handle = half.register_hook(fail)
        before = trained(stage)
        with pytest.raises(MemoryError, match="no room"):
            stage.step(0)
        handle.remove()
        assert not same(trained(stage), before)  # the failure came in the midst of the updates
        for weight in stage.trainables.values():
            weight.grad = None
        ordinary_backward(stage)


def test_several_processes_are_refused_inside(folder: Path) -> None:
    """Before anything is updated; one optimiser a weight after the backward pass takes them."""
    with tuning(folder, processes=SimulatedProcess(1, 2), **INSIDE) as stage:
        before = trained(stage)
        with pytest.raises(ImagicError, match=r"--optimizer-in-backward with 2 processes.*--no-optimizer-in-backward"):
            stage.step(0)
        assert same(trained(stage), before)
        assert all(weight.grad is None for weight in stage.trainables.values())
    with tuning(folder, processes=SimulatedProcess(1, 2), **STOCHASTIC) as stage:
        before = trained(stage)
        stage.step(0)
        assert not same(trained(stage), before)


@pytest.mark.parametrize("memory", [INSIDE, STOCHASTIC, STOCHASTIC | INSIDE], ids=["fp32", "bf16", "bf16-inside"])
def test_a_gradient_that_is_not_finite_is_not_stepped_with(folder: Path, memory: dict[str, Any]) -> None:
    """Its weight and states keep their bits, all others are updated as ever, and the run stops at the next check."""
    victims = {"mid_block.resnets.0.conv1.weight": torch.nan, "conv_in.weight": torch.inf, "conv_out.bias": -torch.inf}

    def two_steps(poison: bool) -> tuple[Stage, dict[str, Tensor], dict[str, Tensor]]:
        with tuning(folder, **memory) as stage:
            stage.step(0)
            stage.check()
            before = trained(stage) | states(stage)
            for name in victims if poison else ():
                stage.trainables[name].register_hook(poisoned(victims[name]))
            stage.step(1)
            return stage, before, trained(stage) | states(stage)

    _, _, clean = two_steps(False)
    stage, before, after = two_steps(True)
    own = {name for name in after if name.split("/")[0] in victims}
    assert len(own) == 4 * len(victims)  # the weight, both moments, the count of steps
    for name, tensor in after.items():
        assert torch.equal(tensor, (before if name in own else clean)[name]), name
    assert all(not torch.equal(clean[name], before[name]) for name in victims)
    assert not stage.updates.finite
    with pytest.raises(ImagicError, match=r"stage tune is not a finite.*--tune\.learning-rate"):
        stage.check()


@each("memory", [{}, INSIDE, STOCHASTIC])
@each("value", [torch.nan, torch.inf])
def test_the_flag_stays_down(memory: dict[str, Any], value: float) -> None:
    """A good gradient does not make up for a bad one."""
    weight = Parameter(torch.ones(3, dtype=torch.bfloat16 if memory == STOCHASTIC else torch.float32))
    updates = build_updates({"w": weight}, 0.01, on_cpu(**memory), 0)
    finite = []
    for factor in (1.0, value, 1.0):
        updates.backward((weight * torch.tensor([1.0, factor, 1.0])).sum(), 0, Processes())
        finite.append(bool(updates.finite))
    assert finite == [True, False, False]


@pytest.mark.parametrize("memory", [{}, INSIDE, STOCHASTIC], ids=["after", "inside", "bf16"])
def test_a_scaled_loss_gives_the_same_step(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]) -> None:
    """A power of two is multiplied in and divided out exactly: the backward pass sees it, weights, states and losses do not."""
    found, passed = {}, {}
    for scale in (1.0, 1024.0):
        monkeypatch.setattr(updates, "loss_scale", lambda runtime, scale=scale: scale)
        with tuning(folder, **memory) as stage:
            seen: list[Tensor] = []
            stage.trainables["conv_out.weight"].register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
            found[scale], passed[scale] = outcome(stage), seen
    assert len(passed[1.0]) == 3
    assert all(torch.equal(one * 1024, other) for one, other in zip(passed[1.0], passed[1024.0], strict=True))
    assert found[1.0][0] == found[1024.0][0]
    assert same(found[1.0][1], found[1024.0][1])
    assert same(found[1.0][2], found[1024.0][2])


def test_only_fp16_scales_its_loss() -> None:
    """By a power of two, so that dividing by it is exact."""
    scales = {dtype: updates.loss_scale(on_cpu(dtype=dtype)) for dtype in ("fp32", "bf16", "fp16")}
    assert scales["fp32"] == scales["bf16"] == 1
    assert scales["fp16"] > 1
    assert torch.frexp(torch.tensor(scales["fp16"])).mantissa == 0.5


@each("share", [0.0625, 0.25, 0.5, 0.9375])
@each("low", [1.0, -1.0 - UNIT, 2.0**-100, -(2.0**100) * (1 + UNIT)])
def test_rounding_is_right_in_the_mean(low: float, share: float) -> None:
    """Between two neighbours, the upper one comes as often as the value is near to it: five standard errors of 200,000 draws."""
    high = low + UNIT * 2.0 ** torch.frexp(torch.tensor(low, dtype=torch.float64)).exponent.sub(1).item()
    value = low + share * (high - low)
    source = torch.full((200_000,), value, dtype=torch.float32)
    assert source[0].double() == value  # the fraction is exact in fp32
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    round_stochastically(source, target, 3)
    drawn = target.double()
    assert set(drawn.unique().tolist()) == {low, high}
    error = 5 * (high - low) * (share * (1 - share) / len(drawn)) ** 0.5
    assert abs(drawn.mean().item() - value) < error


def test_what_bf16_holds_stays_as_it_is() -> None:
    """Every bf16 number there is, infinities, zeros and subnormals among them, under any noise."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    assert len(every) == 2**16 - 2 * (2**7 - 1)
    for seed in range(3):
        target = torch.zeros_like(every)
        round_stochastically(every.float(), target, seed)
        assert torch.equal(target.view(torch.int16), every.view(torch.int16))


def test_rounding_never_goes_past_a_neighbour() -> None:
    """Random numbers of all sizes end at the bf16 number next below or next above."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-60, 60, (100_000,), generator=generator)
    bits = values.view(torch.int32)
    inner = (bits & -(1 << 16)).view(torch.float32)
    outer = ((bits & -(1 << 16)) + (1 << 16)).view(torch.float32)
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values.clone(), target, 0)
    assert ((target.float() == inner) | (target.float() == outer)).all()
    assert (target.float() == inner).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_rounding_depends_on_its_seed_alone() -> None:
    """Not on the global generator, which it does not move; neighbouring elements draw independently."""
    source, state = torch.full((4096,), 1 + UNIT / 2), torch.get_rng_state()
    drawn = []
    for seed in (5, 5, 6):
        target = torch.empty(source.shape, dtype=torch.bfloat16)
        torch.rand(3)
        round_stochastically(source.clone(), target, seed)
        drawn.append(target)
    torch.set_rng_state(state)
    round_stochastically(source.clone(), drawn[0], 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    ups = [(one > 1).float() for one in drawn]
    assert (ups[0] == ups[2]).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 4096**0.5)
    assert (ups[0][1:] == ups[0][:-1]).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 4095**0.5)


@pytest.mark.parametrize(("optimizer", "inside"), [("adam", False), ("adam8bit", True), ("adafactor", True)])
def test_steps_below_the_resolution_move_bf16_weights_in_the_mean(optimizer: str, inside: bool) -> None:
    """Imagic's rate on weights of 1: as far as fp32 weights move, where weights rounded to nearest do not move at all."""
    count, steps, rate = 2**18, 20, 5e-7
    wide, nearest = (Parameter(torch.ones(count, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    plain = [torch.optim.Adam([weight], lr=rate) for weight in (wide, nearest)]
    weight = Parameter(torch.ones(count, dtype=torch.bfloat16))
    runtime = on_cpu(**STOCHASTIC, optimizer=optimizer, optimizer_in_backward=inside)
    updates = build_updates({"w": weight}, rate, runtime, 0)
    for step in range(steps):
        updates.backward(weight.sum(), step, Processes())
        for one, own in zip((wide, nearest), plain, strict=True):
            one.grad = torch.ones_like(one)
            own.step()
    moved = 1 - wide[0].item()
    assert moved == pytest.approx(steps * rate, rel=0.1)
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert weight.dtype == torch.bfloat16
    drift = (1 - weight.detach().double()).mean().item()
    deviation = (moved * UNIT / 2 / count) ** 0.5  # of a mean of jumps by UNIT / 2, the distance below 1
    assert abs(drift - moved) < 5 * deviation < 0.5 * moved


@pytest.mark.parametrize(("optimizer", "inside"), [("adam", False), ("adam8bit", True)])
def test_bf16_weights_land_next_to_the_step_in_fp32(folder: Path, optimizer: str, inside: bool) -> None:
    """Adam's first step in closed form, p - lr * g / (|g| + eps), from the gradients seen; each weight at one of its two neighbours."""
    with tuning(folder, **STOCHASTIC, optimizer=optimizer, optimizer_in_backward=inside) as stage:
        seen: dict[str, Tensor] = {}
        for name, weight in stage.trainables.items():
            weight.register_hook(lambda gradient, name=name: seen.update({name: gradient.double()}))
        before = trained(stage)
        stage.step(0)
        ups = []
        for name, weight in trained(stage).items():
            assert weight.dtype == torch.bfloat16
            gradient, now = seen[name], weight.double()
            exact = before[name].double() - 0.01 * gradient / (gradient.abs() + 1e-8)
            apart = torch.ldexp(torch.ones_like(exact), exact.float().frexp().exponent - 8)  # bf16 numbers around it
            assert ((now - exact).abs() <= apart * 1.01 + 1e-9).all(), name
            ups.append((now > exact).flatten())
        assert torch.cat(ups).double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert all(master.numel() == 0 for master in stage.updates.masters.values())  # pyright: ignore[reportAttributeAccessIssue]


def test_bf16_weights_depend_on_the_seed_and_not_on_the_order_of_updates(folder: Path) -> None:
    """The same seed is the same bits, inside the backward pass and after it; the noise of another seed is another."""
    runs = []
    for seed, inside in ((0, False), (0, True), (1, False)):
        with tuning(folder, **STOCHASTIC, optimizer_in_backward=inside) as stage:
            stage.updates.seed += seed  # pyright: ignore[reportAttributeAccessIssue]
            stage.step(0)
            runs.append(trained(stage))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_each_weight_and_step_rounds_by_noise_of_its_own() -> None:
    """Equal weights with equal gradients part, and a step repeated under another number ends elsewhere."""
    ends = []
    for step in (0, 0, 1):
        pair = {name: Parameter(torch.full((512,), 1.0, dtype=torch.bfloat16)) for name in "ab"}
        updates = build_updates(pair, UNIT / 4, on_cpu(**STOCHASTIC), 0)
        updates.backward(torch.stack([weight.sum() for weight in pair.values()]).sum(), step, Processes())
        assert not torch.equal(pair["a"], pair["b"])
        ends.append(pair["a"].detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("mode", "memory"),
    [
        pytest.param("full", STOCHASTIC | {"optimizer": "adam"}, marks=pytest.mark.slow),
        pytest.param("full", STOCHASTIC | INSIDE | {"optimizer": "adam8bit"}, marks=pytest.mark.slow),
        ("lora", INSIDE | {"optimizer": "adam8bit"}),
        ("full", STOCHASTIC | INSIDE | {"optimizer": "adafactor"}),
    ],
    ids=["bf16", "bf16-8bit-inside", "lora-8bit-inside", "bf16-adafactor-inside"],
)
def test_a_resumed_run_is_the_uninterrupted_run(folder: Path, mode: Mode, memory: dict[str, Any]) -> None:
    """A state taken after two steps, loaded into a new stage on a new base, comes to the same bits."""
    with tuning(folder, mode, **memory) as stage:
        steps = train(stage)
        list(islice(steps, 2))
        state = {key: value.clone() for key, value in stage.state_dict().items()}
        losses = [report.loss.item() for report in steps]
        uninterrupted, kept = trained(stage), states(stage)
    with tuning(folder, mode, **memory) as stage:
        stage.load_state_dict(state)
        assert [report.loss.item() for report in train(stage, start=2)] == losses
        assert same(trained(stage), uninterrupted)
        assert same(states(stage), kept)
