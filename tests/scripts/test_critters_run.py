"""The training loop of the embedded base, and its tokenizer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from critters_run import Run, Settings, drawn, orthogonalised, pictures, tokenizer
from diffusers import StableDiffusionPipeline
from train_critters import PARTS, main, text_config

from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.critters import longest_caption, scene_at
from imagic_lora.critters.judge import Judge

STEPS = 6


def settings_of(work: Path, pictures: int = 8) -> Settings:
    work.mkdir(exist_ok=True)
    return Settings(work, seed=3, pictures=pictures, device="cpu")


def run_of(work: Path, steps: int = STEPS, held: float = 0.0) -> Run:
    """A run that trains a 3 x 3 linear layer to reproduce noise."""
    torch.manual_seed(0)
    return Run(settings_of(work), "toy", torch.nn.Linear(3, 3), steps, lr=0.1, muon=0.01, held=held)


def trained(run: Run, steps: int | None = None) -> list[np.ndarray]:
    """The numbers that each step drew."""
    seen: list[np.ndarray] = []

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        seen.append(rng.standard_normal(3))
        x = torch.randn(4, 3)
        return (run.module(x) - x).square().mean() + 0.1 * torch.tensor(seen[-1]).sum()

    for step in run.train(loss_of):
        if step == steps:
            break
    return seen


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Weights, averaged weights, random numbers and learning rate are bit-equal."""
    whole = run_of(tmp_path / "whole")
    drawn = trained(whole)
    first = run_of(tmp_path / "halves")
    before = trained(first, 4)
    first.save()
    second = run_of(tmp_path / "halves")
    assert second.step == 4
    np.testing.assert_array_equal(before + trained(second), drawn)
    assert [one.get_last_lr() for one in second.schedules] == [one.get_last_lr() for one in whole.schedules]
    assert torch.equal(weights(second.module), weights(whole.module))
    last = weights(whole.module)
    assert torch.equal(weights(second.averaged()), weights(whole.averaged()))
    assert not torch.equal(weights(whole.module), last)


def test_a_run_that_is_done_does_nothing_more(tmp_path: Path) -> None:
    trained(run_of(tmp_path))
    assert trained(run_of(tmp_path)) == []


def test_every_hundredth_step_is_logged(tmp_path: Path) -> None:
    run = run_of(tmp_path, 200)
    for _ in run.train(lambda _: run.module(torch.ones(3)).square().sum()):
        pass
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200]
    assert lines[1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(("held", "half"), [(0.0, 500), (0.4, 700)])
def test_the_rate_rises_is_held_and_falls(tmp_path: Path, held: float, half: int) -> None:
    """It rises over 200 steps, keeps its peak for the held share, and falls as a cosine to 2%."""
    run = run_of(tmp_path, 1000, held)
    rate = [run._rate(step) for step in range(1001)]
    assert rate[0] == pytest.approx(1 / 200)
    assert rate[99] == pytest.approx(0.5 * rate[199], rel=0.1)
    assert all(one == pytest.approx(1) for one in rate[200 : round(1000 * held)])
    assert rate[half] == pytest.approx(0.51)
    assert rate[1000] == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (30, 4)])
def test_an_update_of_muon_has_nearly_equal_singular_values(shape: tuple[int, int]) -> None:
    """Its singular vectors are those of the gradient."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    found = left.T @ orthogonalised(gradient) @ right.T
    assert values.max() / values.min() > 1.3
    assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.2)).all()
    assert torch.allclose(found, torch.diag(found.diagonal()), atol=1e-4)


def test_muon_trains_the_hidden_layers_and_adam_the_others(tmp_path: Path) -> None:
    """A first step moves a hidden matrix by its scale times a semi-orthogonal one, and a bias by the rate of Adam."""
    run = run_of(tmp_path)
    before = {name: value.detach().clone() for name, value in run.module.named_parameters()}
    trained(run, 1)
    moved = {name: value.detach() - before[name] for name, value in run.module.named_parameters()}
    assert torch.allclose(moved["bias"].abs(), torch.full((3,), 0.1 / 200), rtol=1e-3)
    sizes = torch.linalg.svdvals(moved["weight"]) / (0.01 / 200 * 0.2 * 3**0.5)
    assert 0.5 < sizes.min() <= sizes.max() < 1.3


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    first = pictures(settings)
    assert first.shape == (8, 64, 64, 3)
    np.testing.assert_array_equal(first[3], drawn(3))
    (file,) = tmp_path.iterdir()
    changed = file.stat().st_mtime_ns
    np.testing.assert_array_equal(pictures(settings), first)
    assert file.stat().st_mtime_ns == changed


def test_no_caption_exceeds_the_text_encoder(tmp_path: Path) -> None:
    """A tokenizer is trained once, and whole words of captions are single tokens."""
    words = tokenizer(tmp_path)
    assert tokenizer(tmp_path).get_vocab() == words.get_vocab()
    assert words.model_max_length == text_config(words).max_position_embeddings
    assert all(len(words(longest_caption(scene_at("train", k))).input_ids) <= words.model_max_length for k in range(100))
    assert words.tokenize("a brown dog") == ["a</w>", "brown</w>", "dog</w>"]


def command(work: Path, *arguments: str) -> None:
    """Runs the whole command with two steps of each part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_critters.py", "--work", str(work), "--pictures", "16", "--device", "cpu", *arguments])
        patch.setattr("train_critters.PARTS", {name: (train, 2, weights) for name, (train, _, weights) in PARTS.items()})
        main()


@pytest.mark.slow
def test_one_command_makes_a_base_that_plain_diffusers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an empty folder: every part of the package, and the digests of its weights. Again it does nothing; another seed is refused."""
    command(tmp_path)
    data = tmp_path / "data"
    first = capsys.readouterr().out
    assert re.findall(r"^[0-9a-f]{64}  (\S+)$", first, re.MULTILINE) == [
        "clip/model.safetensors",
        "judge.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    Judge.load(data / "judge.safetensors")
    CritterAlignment.load(data)
    pipe = StableDiffusionPipeline.from_pretrained(data)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    pipe("a dog", height=64, width=64, num_inference_steps=2)
    command(tmp_path)
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        command(tmp_path, "--seed", "1")
