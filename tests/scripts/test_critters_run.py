"""The training loop of the embedded base, and its tokenizer."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from critters_run import Run, drawn_neighbour, pictures
from critters_words import adopt, text_config, tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import longest_caption, scene_at

STEPS = 6


def run_of(work: Path, steps: int = STEPS, held: float = 0.0) -> Run:
    """A run that trains a 3 x 3 linear layer to reproduce noise, under bfloat16 autocast."""
    work.mkdir(exist_ok=True)
    torch.manual_seed(0)
    args = argparse.Namespace(work=work, part="toy", device="cpu", steps=steps, seed=3)
    return Run(args, torch.nn.Linear(3, 3), lr=0.1, held=held)


def trained(run: Run, steps: int = STEPS) -> list[np.ndarray]:
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
    assert second.schedule.get_last_lr() == whole.schedule.get_last_lr()
    assert torch.equal(weights(second.module), weights(whole.module))
    last = weights(whole.module)
    assert torch.equal(weights(second.averaged()), weights(whole.averaged()))
    assert not torch.equal(weights(whole.module), last)


def test_a_run_that_is_done_does_nothing_more(tmp_path: Path) -> None:
    for _ in run_of(tmp_path).train(lambda _: torch.zeros((), requires_grad=True)):
        pass
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


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    first = pictures(tmp_path, 5, drawn_neighbour)
    assert first.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(first[3], drawn_neighbour(3))
    (file,) = tmp_path.iterdir()
    changed = file.stat().st_mtime_ns
    np.testing.assert_array_equal(pictures(tmp_path, 5, drawn_neighbour), first)
    assert file.stat().st_mtime_ns == changed


def test_the_words_are_those_of_the_package() -> None:
    """A new training uses the tokenizer of the package; no caption exceeds the encoder's length."""
    words = tokenizer()
    assert words.get_vocab() == CLIPTokenizer.from_pretrained(CRITTERS / "tokenizer").get_vocab()
    assert words.model_max_length == text_config(words).max_position_embeddings
    assert all(len(words(longest_caption(scene_at("train", k))).input_ids) <= words.model_max_length for k in range(100))


def test_another_base_is_adopted_token_by_token(tmp_path: Path) -> None:
    """The embeddings of common tokens are copied to their own rows, all other weights too; the row of a token that only one has stays."""
    theirs = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "cat</w>": 2, "dog</w>": 3}, merges=[])
    mine = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "dog</w>": 2, "cow</w>": 3}, merges=[])
    theirs.save_pretrained(tmp_path / "tokenizer")

    def model(words: CLIPTokenizer) -> CLIPTextModel:
        return CLIPTextModel(text_config(words))

    other, own = model(theirs), model(mine)
    cow = own.get_input_embeddings().weight[3].clone()
    adopt(own, mine, other, tmp_path)
    assert torch.equal(own.get_input_embeddings().weight[2], other.get_input_embeddings().weight[3])
    assert torch.equal(own.get_input_embeddings().weight[3], cow)
    others = {name: value for name, value in other.state_dict().items() if not name.endswith("token_embedding.weight")}
    assert all(torch.equal(own.state_dict()[name], value) for name, value in others.items())
