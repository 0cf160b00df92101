"""Stages: what they train and leave alone, resume, precision, processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from common import KINDS, SimulatedProcess, opened, same, weights
from torch import Tensor

from imagic_lora.adapters.full import unfrozen
from imagic_lora.adapters.lora import attached
from imagic_lora.bases.base import Base
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EmbedConfig, Mode, TuneConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.noise import noise_at, times_at
from imagic_lora.core.runtime import Processes
from imagic_lora.training.embed import embed_stage, optimised
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.stage import Stage, train
from imagic_lora.training.tune import tune_stage
from imagic_lora.training.updating.updates import JointUpdates

STAGES: list[tuple[str, Mode]] = [("embed", "lora"), ("tune", "lora"), ("tune", "full")]
every_stage = pytest.mark.parametrize(("name", "mode"), STAGES)


def every_stage_with(name: str, *values: object) -> pytest.MarkDecorator:
    """Every stage, each with one of some values: what is tested differs with the value and the stage, not with the pair."""
    return pytest.mark.parametrize(("name", "mode", name), [(*stage, value) for stage, value in zip(STAGES, values, strict=True)])


@contextmanager
def staged(base: Base, name: str, mode: Mode = "lora", processes: Processes | None = None, seed: int = 0, **settings) -> Iterator[Stage]:
    """A stage on fixed latents."""
    pixels = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, text, processes = base.encode_image(pixels), base.encode_prompt("a cat"), processes or Processes()
    settings = {"steps": 5, "learning_rate": 0.01, "batch_size": 2} | settings
    if name == "embed":
        yield embed_stage(base, latents, text, EmbedConfig.model_validate(settings), seed, processes)
        return
    config = TuneConfig.model_validate(settings | {"mode": mode, "rank": 4, "targets": "attention+conv"})
    with unfrozen(base) if mode == "full" else attached(base, config, seed) as parameters:
        yield tune_stage(base, latents, text, parameters, config, seed, processes)


def trained(stage: Stage) -> dict[str, Tensor]:
    """What a stage has come to."""
    return {name: value.detach().clone() for name, value in stage.trainables.items()}


def gradients(stage: Stage) -> dict[str, Tensor]:
    """The gradients of step 0, as the optimiser sees them, and the loss."""
    seen: dict[str, Tensor] = {}

    def keep() -> None:
        seen.update({name: p.grad.clone() for name, p in stage.trainables.items() if p.grad is not None})

    assert isinstance(stage.updates, JointUpdates)
    stage.updates.optimizer.step = keep  # pyright: ignore[reportAttributeAccessIssue]
    loss = stage.step(0).loss
    assert seen
    return seen | {"loss": loss}


def test_embed_changes_the_embedding_and_nothing_else(folder: Path) -> None:
    """Denoiser, decoder and text encoder are bit-equal; the target text stays as it was."""
    base = opened(folder)
    pipe = base.pipeline("text2image")
    before = [weights(module) for module in (pipe.unet, pipe.vae, base._helpers["text_encoder"])]
    text = base.encode_prompt("a cat").tokens
    with staged(base, "embed") as stage:
        list(train(stage))
        assert not torch.equal(optimised(stage).tokens, text)
    assert all(same(weights(module), b) for module, b in zip((pipe.unet, pipe.vae, base._helpers["text_encoder"]), before, strict=True))


def test_embed_starts_from_the_target_text(folder: Path) -> None:
    """Bit-equal, but a copy."""
    base = opened(folder)
    text = base.encode_prompt("a cat")
    stage = embed_stage(base, torch.zeros(1, 4, 8, 8), text, EmbedConfig(), 0, Processes())
    assert torch.equal(stage.trainables["tokens"], text.tokens)
    assert stage.trainables["tokens"].data_ptr() != text.tokens.data_ptr()


def test_tuning_by_lora_leaves_the_base_weights(folder: Path) -> None:
    """Below the adapted layers every weight is bit-equal, while every LoRA matrix has moved."""
    base = opened(folder)
    before = weights(base.denoiser)
    with staged(base, "tune", "lora") as stage:
        start = trained(stage)
        list(train(stage))
        now = {name.replace(".base_layer", ""): value for name, value in weights(base.denoiser).items() if ".lora_" not in name}
        assert same(now, before)
        assert all(not torch.equal(value, start[name]) for name, value in trained(stage).items())


def test_tuning_in_full_changes_the_denoiser_alone(folder: Path) -> None:
    """Every weight of the U-Net moves; decoder and text encoder are bit-equal."""
    base = opened(folder, "full")
    pipe = base.pipeline("text2image")
    before, vae, text = weights(pipe.unet), weights(pipe.vae), weights(base._helpers["text_encoder"])
    with staged(base, "tune", "full") as stage:
        list(train(stage))
        now = weights(pipe.unet)
    assert all(not torch.equal(now[name], before[name]) for name in now)
    assert same(weights(pipe.vae), vae)
    assert same(weights(base._helpers["text_encoder"]), text)


@every_stage
def test_trainables_are_fp32_on_a_bf16_base(folder: Path, name: str, mode: Mode) -> None:
    """Whatever the arithmetic; and it trains."""
    with staged(opened(folder, mode, dtype="bf16"), name, mode) as stage:
        assert {p.dtype for p in stage.trainables.values()} == {torch.float32}
        before = trained(stage)
        list(train(stage))
        assert {p.dtype for p in stage.trainables.values()} == {torch.float32}
        assert not same(trained(stage), before)


@every_stage_with("dtype", "fp16", "bf16", "fp16")
def test_half_precision_gradients_point_where_fp32_gradients_point(folder: Path, name: str, mode: Mode, dtype: str) -> None:
    """The same direction and length to the precision's few digits, the loss scale of fp16 taken out again."""
    with staged(opened(folder, mode), name, mode) as stage:
        exact = gradients(stage)
    with staged(opened(folder, mode, dtype=dtype), name, mode) as stage:
        rounded = gradients(stage)
    one, other = (torch.cat([value.flatten() for value in found.values()]) for found in (exact, rounded))
    assert (one - other).norm() < 0.05 * one.norm()


@every_stage
def test_the_same_seed_is_the_same_run(folder: Path, name: str, mode: Mode) -> None:
    """Bit for bit; another seed is another run."""
    runs = []
    for seed in (0, 0, 1):
        with staged(opened(folder, mode), name, mode, seed=seed) as stage:
            runs.append((trained(stage), [report.loss.item() for report in train(stage)], trained(stage)))
    assert runs[0][1] == runs[1][1] != runs[2][1]
    assert same(runs[0][2], runs[1][2])
    assert not same(runs[0][2], runs[2][2])


@every_stage_with("optimizer", "adam", "adam8bit", "adam")
def test_a_resumed_run_is_the_uninterrupted_run(folder: Path, name: str, mode: Mode, optimizer: str) -> None:
    """A state taken after two steps, loaded into a new stage on a new base, comes to the same bits, and can be loaded again."""
    with staged(opened(folder, mode, optimizer=optimizer), name, mode) as stage:
        steps = train(stage)
        list(islice(steps, 2))
        state = {key: value.clone() for key, value in stage.state_dict().items()}
        losses = [report.loss.item() for report in steps]
        uninterrupted = trained(stage)
    for _ in range(2):
        with staged(opened(folder, mode, optimizer=optimizer), name, mode) as stage:
            stage.load_state_dict(state)
            assert [report.loss.item() for report in train(stage, start=2)] == losses
            assert same(trained(stage), uninterrupted)


@every_stage
def test_checkpointing_gives_the_same_gradients(folder: Path, name: str, mode: Mode) -> None:
    """Recomputed activations are the same activations."""
    found = []
    for switch in (False, True):
        base = opened(folder, mode, gradient_checkpointing=switch)
        assert base.denoiser.is_gradient_checkpointing == switch
        with staged(base, name, mode) as stage:
            found.append(gradients(stage))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-8)


def test_checkpointing_recomputes(folder: Path) -> None:
    """With it on, a block runs twice a step: once on the way back."""
    counts = []
    for switch in (False, True):
        base, calls = opened(folder, gradient_checkpointing=switch), []
        base.denoiser.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        with staged(base, "embed") as stage:
            stage.step(0)
        counts.append(len(calls))
    assert counts == [1, 2]


def test_adam8bit_keeps_large_states_in_8_bits(folder: Path) -> None:
    """uint8 for tensors of 4,096 elements and more, fp32 below."""
    with staged(opened(folder, "full", optimizer="adam8bit"), "tune", "full") as stage:
        stage.step(0)
        assert isinstance(stage.updates, JointUpdates)
        states = stage.updates.optimizer.state
        kinds = {(p.numel() >= 4096, states[p]["state1"].dtype) for p in stage.trainables.values()}
    assert kinds == {(True, torch.uint8), (False, torch.float32)}


def test_adam_takes_its_first_step_by_the_closed_form(folder: Path) -> None:
    """p - lr * g / (|g| + eps), from arXiv 1412.6980 with both moments corrected."""
    base = opened(folder)
    with staged(base, "embed") as stage:
        gradient = gradients(stage)["tokens"].double()
    with staged(base, "embed") as stage:
        expected = trained(stage)["tokens"].double() - 0.01 * gradient / (gradient.abs() + 1e-8)
        stage.step(0)
        torch.testing.assert_close(trained(stage)["tokens"].double(), expected, rtol=1e-5, atol=1e-7)


@every_stage
def test_nan_latents_stop_the_first_step(folder: Path, name: str, mode: Mode) -> None:
    """The error says which stage and which settings to change."""
    with staged(opened(folder, mode), name, mode) as stage:
        stage.latents[0, 0, 0, 0] = torch.nan
        with pytest.raises(ImagicError, match=f"stage {name} is not a finite.*--{name}.learning-rate"):
            next(train(stage))


@every_stage_with("value", torch.inf, torch.nan, torch.inf)
def test_a_weight_that_is_not_finite_stops_the_step_where_it_occurs(folder: Path, name: str, mode: Mode, value: float) -> None:
    """Two good steps, then the error."""
    with staged(opened(folder, mode), name, mode) as stage:
        steps = train(stage)
        assert len(list(islice(steps, 2))) == 2
        with torch.no_grad():
            next(iter(stage.trainables.values())).view(-1)[0] = value
        with pytest.raises(ImagicError, match="not a finite"):
            next(steps)


def test_closing_the_iterator_stops(folder: Path) -> None:
    """No step is taken after it."""
    with staged(opened(folder), "embed") as stage:
        steps = train(stage)
        next(steps)
        before = trained(stage)
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert list(steps) == []
        assert same(trained(stage), before)


@every_stage_with("kind", KINDS[0], KINDS[1], KINDS[0])
def test_learning_lowers_the_loss(folders: dict[str, Path], kind: str, name: str, mode: Mode) -> None:
    """On noise and times that are not those of the training."""
    base = opened(folders[kind], mode)
    noise = torch.randn(32, 4, 8, 6, generator=torch.Generator().manual_seed(9))
    times = torch.arange(32, dtype=torch.float64) / 32
    with staged(base, name, mode, steps=20, batch_size=4) as stage, torch.no_grad():
        before = denoising_loss(base, stage.latents, stage.conditioning(), noise, times).mean()
        with torch.enable_grad():
            list(train(stage))
        after = denoising_loss(base, stage.latents, stage.conditioning(), noise, times).mean()
    assert after < before


@every_stage_with("timesteps", "stratified", "uniform", "stratified")
def test_two_processes_are_one_with_twice_the_batch(folder: Path, name: str, mode: Mode, timesteps: str) -> None:
    """Loss and gradients of a batch of 2 are the mean of those of its halves, samples being numbered over all processes."""

    def run(rank: int, count: int, batch_size: int) -> dict[str, Tensor]:
        with staged(opened(folder, mode), name, mode, SimulatedProcess(rank, count), batch_size=batch_size, timesteps=timesteps) as stage:
            return gradients(stage)

    whole, first, second = run(0, 1, 2), run(0, 2, 1), run(1, 2, 1)
    assert not torch.equal(first["loss"], second["loss"])
    for key, value in whole.items():
        torch.testing.assert_close((first[key] + second[key]) / 2, value, rtol=1e-4, atol=1e-6)


def test_noise_on_the_embedding_is_that_of_each_sample(folder: Path) -> None:
    """Loss and gradient are the means over the samples, each with the embedding plus noise of its own; without it they are others."""
    base = opened(folder)
    with staged(base, "embed") as stage:
        plain = gradients(stage)
    with staged(base, "embed", noise=0.3) as stage:
        found, start = gradients(stage), trained(stage)["tokens"]
        losses = []
        leaf = start.clone().requires_grad_()
        for sample in range(2):
            noise = noise_at(0, "embed", 0, [sample], tuple(stage.latents.shape[1:]))
            times = times_at(0, "embed", 0, [sample], 2, "stratified")
            noisy = leaf + 0.3 * start.std() * noise_at(0, "embed/tokens", 0, [sample], tuple(start.shape[1:]))
            losses.append(denoising_loss(base, stage.latents, Conditioning(noisy), noise, times))
        loss = torch.cat(losses).mean()
        loss.backward()
        assert torch.equal(stage.conditioning().tokens, start), "what is evaluated and stored has no noise"
    assert leaf.grad is not None
    torch.testing.assert_close(found, {"tokens": leaf.grad, "loss": loss.detach()}, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found["tokens"], plain["tokens"], rtol=1e-2)


def test_noise_on_the_embedding_of_two_processes_is_that_of_one_with_twice_the_batch(folder: Path) -> None:
    """Samples are numbered over all processes; a step does not depend on those before it."""

    def run(rank: int, count: int, batch_size: int) -> dict[str, Tensor]:
        with staged(opened(folder), "embed", processes=SimulatedProcess(rank, count), batch_size=batch_size, noise=0.3) as stage:
            return gradients(stage)

    whole, first, second = run(0, 1, 2), run(0, 2, 1), run(1, 2, 1)
    for key, value in whole.items():
        torch.testing.assert_close((first[key] + second[key]) / 2, value, rtol=1e-4, atol=1e-6)
    with staged(opened(folder), "embed", noise=0.3) as stage:
        list(islice(train(stage), 2))
        state, losses = {name: value.clone() for name, value in stage.state_dict().items()}, [stage.step(2).loss.item()]
    with staged(opened(folder), "embed", noise=0.3) as stage:
        stage.load_state_dict(state)
        assert [stage.step(2).loss.item()] == losses
