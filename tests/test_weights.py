"""LoRA and full weights: exact ways in and back, and files that plain diffusers reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from common import MODES, opened, output, same, weights
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import Parameter

from imagic_lora.adapter import Adapter
from imagic_lora.bases.base import Base
from imagic_lora.config import Mode, TuneConfig
from imagic_lora.durable import Draft
from imagic_lora.errors import ImagicError
from imagic_lora.full import WEIGHTS, loaded_full, save_full, unfrozen
from imagic_lora.lora import LORA_FILE, attached, loaded_lora, save_lora

TARGETS = ["attention", "attention+conv"]


def lora_config(targets: str = "attention", rank: int = 4, alpha: float | None = None) -> TuneConfig:
    return TuneConfig.model_validate({"targets": targets, "rank": rank, "alpha": alpha})


def trainable(base: Base, mode: Mode, targets: str = "attention") -> AbstractContextManager[dict[str, Parameter]]:
    return unfrozen(base) if mode == "full" else attached(base, lora_config(targets), 0)


def shake(parameters: dict[str, Parameter]) -> None:
    """Moves every parameter, so that the output moves too."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("mode", "targets"), [("lora", "attention"), ("lora", "attention+conv"), ("full", "")])
@pytest.mark.parametrize("error", [False, True])
def test_training_weights_leave_no_trace(folder: Path, mode: Mode, targets: str, error: bool) -> None:
    """Names, values, output and frozenness are as before, also after an exception."""
    base = opened(folder, mode)
    before, picture = weights(base.denoiser), output(base)
    try:
        with trainable(base, mode, targets) as parameters:
            shake(parameters)
            assert not torch.equal(output(base), picture)
            if error:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert error
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())


@pytest.mark.parametrize("targets", TARGETS)
def test_fresh_lora_changes_nothing_yet(folder: Path, targets: str) -> None:
    """B starts at zero."""
    base = opened(folder)
    picture = output(base)
    with attached(base, lora_config(targets), 0):
        assert torch.equal(output(base), picture)


@pytest.mark.parametrize(("targets", "ends"), [("attention", ("to_q", "to_k", "to_v", "to_out.0")),
                                               ("attention+conv", ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"))])  # fmt: skip
def test_lora_adapts_the_layers_of_its_preset(folder: Path, targets: str, ends: tuple[str, ...]) -> None:
    """All of them and no others, at the rank asked for; what trains is LoRA only."""
    base = opened(folder)
    expected = {name for name, _ in base.denoiser.named_modules() if name.endswith(tuple(f".{end}" for end in ends))}
    with attached(base, lora_config(targets, rank=3), 0) as parameters:
        assert {name.split(".lora_")[0] for name in parameters} == expected
        assert all(p.shape[0] == 3 for name, p in parameters.items() if ".lora_A." in name)
        assert {name for name, p in base.denoiser.named_parameters() if p.requires_grad} == set(parameters)


def test_lora_starts_from_its_seed_alone(folder: Path) -> None:
    """The same seed gives the same matrices whatever was drawn before, and the global generator does not notice."""
    base, found = opened(folder), []
    for seed in (0, 0, 1):
        state = torch.random.get_rng_state()
        with attached(base, lora_config(), seed) as parameters:
            found.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("alpha", [None, 1.0, 10.0])
def test_saved_lora_is_exact_in_plain_diffusers(folder: Path, tmp_path: Path, targets: str, alpha: float | None) -> None:
    """load_lora_weights gives the output it had in training, at whatever scale alpha / rank."""
    base = opened(folder)
    with attached(base, lora_config(targets, alpha=alpha), 0) as parameters:
        shake(parameters)
        expected = output(base)
        save_lora(base, Draft(tmp_path))
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path)
    base._unet = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(output(base), expected)


def test_full_weights_are_half_precision_in_diffusers_format(folder: Path, tmp_path: Path) -> None:
    """Every tensor is the trained one rounded to fp16, under diffusers' own names."""
    base = opened(folder, "full")
    with unfrozen(base) as parameters:
        shake(parameters)
        expected = {name: value.half() for name, value in sorted(weights(base.denoiser).items())}
        save_full(base, Draft(tmp_path))
    assert same(dict(sorted(load_file(tmp_path / "unet" / WEIGHTS).items())), expected)


def test_full_weights_beyond_half_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    """65,504 is the largest."""
    base = opened(folder, "full")
    with unfrozen(base) as parameters, torch.no_grad():
        parameters["conv_in.bias"][0] = 1e5
        with pytest.raises(ImagicError, match=r"conv_in\.bias does not fit in half precision"):
            save_full(base, Draft(tmp_path))


def test_full_fine_tuning_needs_master_weights(folder: Path) -> None:
    """A bf16 U-Net is refused, one opened with master weights is not."""
    with pytest.raises(ImagicError, match="fp32 master weights"), unfrozen(opened(folder, "lora", dtype="bf16")):
        pass
    with unfrozen(opened(folder, "full", dtype="bf16")) as parameters:
        assert {p.dtype for p in parameters.values()} == {torch.float32}


def test_weights_that_round_stochastically_are_trained_in_bf16(folder: Path) -> None:
    """The one half precision that is trained, and then it is nothing else: fp16 and fp32 weights are refused."""
    with unfrozen(opened(folder, "full", dtype="bf16", master_weights="bf16-stochastic")) as parameters:
        assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    for wrong in (torch.float16, torch.float32):
        base = opened(folder, "full", dtype="bf16", master_weights="bf16-stochastic")
        base.denoiser.to(wrong)
        with pytest.raises(ImagicError, match="bf16 weights, rounded stochastically"), unfrozen(base):
            pass


@pytest.mark.parametrize("error", [False, True])
def test_weights_that_need_not_be_restored_stay_as_they_were_trained(folder: Path, error: bool) -> None:
    """Frozen again all the same, also after an exception."""
    base = opened(folder, "full")
    before = weights(base.denoiser)
    with suppress(KeyboardInterrupt), unfrozen(base, restore=False) as parameters:
        shake(parameters)
        trained = weights(base.denoiser)
        if error:
            raise KeyboardInterrupt
    assert same(weights(base.denoiser), trained)
    assert not same(trained, before)
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [False, True])
def test_stored_weights_leave_no_trace(folder: Path, fitted: Callable[..., Adapter], mode: Mode, error: bool) -> None:
    """A loaded adapter changes the output; afterwards, also after an exception, names, values and output are as before."""
    base, load = opened(folder), {"lora": loaded_lora, "full": loaded_full}[mode]
    before, picture = weights(base.denoiser), output(base)
    try:
        with load(base, fitted(mode).folder):
            assert not torch.equal(output(base), picture)
            if error:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert error
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)


def test_loaded_full_weights_are_those_of_the_file(folder: Path, fitted: Callable[..., Adapter]) -> None:
    """Every one of them, in the base's precision."""
    base, stored = opened(folder), load_file(fitted("full").folder / "unet" / WEIGHTS)
    with loaded_full(base, fitted("full").folder):
        now = weights(base.denoiser)
    assert same(dict(sorted(now.items())), {name: value.float() for name, value in sorted(stored.items())})


def test_lora_files_tell_their_settings(fitted: Callable[..., Adapter]) -> None:
    """The adapter's own metadata is in the file, with the alpha that is not its rank."""
    with safe_open(fitted("lora").folder / LORA_FILE, "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stored["unet.r"], stored["unet.lora_alpha"]) == (4, 2)
