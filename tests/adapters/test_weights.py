"""LoRA and full weights: exact ways in and back, and files that plain diffusers reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from common import TUNED, opened, output, same, slow_but, weights
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.full import WEIGHTS, loaded_full, save_full, unfrozen
from imagic_lora.adapters.lora import LORA_FILE, LoraLayers, attached, loaded_lora, read_lora, save_lora, swap_lora
from imagic_lora.bases.base import Base
from imagic_lora.bases.layers import LORA_TARGETS
from imagic_lora.core.config import Mode, TuneConfig
from imagic_lora.core.errors import ImagicError

TARGETS = list(LORA_TARGETS)


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


@contextmanager
def leaving_no_trace(base: Base, error: bool) -> Iterator[Tensor]:
    """Gives the output before; afterwards names, values and output are as before. Ctrl-C is expected inside if ``error``, and only then."""
    before, picture = weights(base.denoiser), output(base)
    try:
        yield picture
    except KeyboardInterrupt:
        assert error
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)


@pytest.mark.parametrize(("mode", "targets"), [("lora", "attention"), ("lora", "attention+conv"), ("full", "")])
@pytest.mark.parametrize("error", [False, True])
def test_training_weights_leave_no_trace(folder: Path, mode: Mode, targets: str, error: bool) -> None:
    """Names, values, output and frozenness are as before, also after an exception."""
    base = opened(folder, mode)
    with leaving_no_trace(base, error) as picture, trainable(base, mode, targets) as parameters:
        shake(parameters)
        assert not torch.equal(output(base), picture)
        if error:
            raise KeyboardInterrupt
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


@pytest.mark.parametrize(("targets", "alpha"), list(zip(TARGETS, [10.0, None, 1.0], strict=True)))
def test_saved_lora_is_exact_in_plain_diffusers(folder: Path, tmp_path: Path, targets: str, alpha: float | None) -> None:
    """load_lora_weights gives the output it had in training, at whatever scale alpha / rank."""
    base = opened(folder)
    with attached(base, lora_config(targets, alpha=alpha), 0) as parameters:
        shake(parameters)
        expected = output(base)
        save_lora(base, AtomicWriter(tmp_path))
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path)
    base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(output(base), expected)


def test_full_weights_are_half_precision_in_diffusers_format(folder: Path, tmp_path: Path) -> None:
    """Every tensor is the trained one rounded to fp16, under diffusers' own names."""
    base = opened(folder, "full")
    with unfrozen(base) as parameters:
        shake(parameters)
        expected = {name: value.half() for name, value in sorted(weights(base.denoiser).items())}
        save_full(base, AtomicWriter(tmp_path))
    assert same(dict(sorted(load_file(tmp_path / "unet" / WEIGHTS).items())), expected)


def test_full_weights_beyond_half_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    """65,504 is the largest."""
    base = opened(folder, "full")
    with unfrozen(base) as parameters, torch.no_grad():
        parameters["conv_in.bias"][0] = 1e5
        with pytest.raises(ImagicError, match=r"conv_in\.bias does not fit in half precision"):
            save_full(base, AtomicWriter(tmp_path))


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
        with pytest.raises(ImagicError, match="bf16 weights with stochastic rounding"), unfrozen(base):
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


@pytest.mark.parametrize("mode", TUNED)
@pytest.mark.parametrize("error", [False, True])
def test_stored_weights_leave_no_trace(folder: Path, fitted: Callable[..., Adapter], mode: Mode, error: bool) -> None:
    """A loaded adapter changes the output; afterwards, also after an exception, names, values and output are as before."""
    base, stored = opened(folder), fitted(mode).folder
    loaded = loaded_full(base, stored) if mode == "full" else loaded_lora(base, read_lora(base, stored / LORA_FILE))
    with leaving_no_trace(base, error) as picture, loaded:
        assert not torch.equal(output(base), picture)
        if error:
            raise KeyboardInterrupt


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


def written(base: Base, folder: Path, seed: int, targets: str = "attention", rank: int = 4, alpha: float | None = None) -> Path:
    """A file of random layers for a base."""
    folder.mkdir()
    with attached(base, lora_config(targets, rank, alpha), seed) as parameters:
        shake(parameters)
        save_lora(base, AtomicWriter(folder))
    return folder / LORA_FILE


def in_diffusers(folder: Path, path: Path, dtype: str) -> Tensor:
    """The output of plain diffusers with a file of layers."""
    base = opened(folder, dtype=dtype)
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder).to(base.runtime.dtype)
    pipe.load_lora_weights(path.parent)
    for weight in pipe.unet.parameters():
        weight.data = weight.data.clone()  # at whole multiples of 64 bytes, not as they lie in the file: the last bit may depend on it
    base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    return output(base)


@pytest.mark.parametrize(
    ("targets", "dtype"),
    slow_but([("attention+conv", "bf16")], [("attention", "fp32"), ("attention+conv", "bf16"), ("all", "fp32")]),
)
def test_swapped_layers_are_those_of_plain_diffusers(folder: Path, tmp_path: Path, targets: str, dtype: str) -> None:
    """Whatever rank and alpha they take the place of, and when they come back; the base is bit-equal in the end."""
    base = opened(folder, dtype=dtype)
    sizes: list[tuple[int, float | None]] = [(4, 10.0), (7, 2.0), (1, None)]
    paths = [written(opened(folder), tmp_path / str(k), k, targets, *size) for k, size in enumerate(sizes)]
    expected, before, picture = [in_diffusers(folder, path, dtype) for path in paths], weights(base.denoiser), output(base)
    layers = [read_lora(base, path) for path in paths]
    with loaded_lora(base, layers[0]):
        assert torch.equal(output(base), expected[0])
        for k in (1, 2, 1, 0):
            assert swap_lora(base, layers[k])
            assert torch.equal(output(base), expected[k])
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)


def test_layers_swap_on_a_base_in_4_bits(wide: Path, tmp_path: Path) -> None:
    """What loading them gives there, bit for bit, and the base's codes are as before."""
    base = opened(wide, quantize="nf4")
    paths = [written(base, tmp_path / str(rank), rank, "attention+conv", rank, 3.0) for rank in (2, 5)]
    before, expected = weights(base.denoiser), list[Tensor]()
    first, second = [read_lora(base, path) for path in paths]
    for layers in (first, second):
        with loaded_lora(base, layers):
            expected.append(output(base))
    assert not torch.equal(*expected)
    with loaded_lora(base, first):
        assert swap_lora(base, second)
        assert torch.equal(output(base), expected[1])
        assert swap_lora(base, read_lora(base, paths[0]))
        assert torch.equal(output(base), expected[0])
    assert same(weights(base.denoiser), before)


def test_layers_of_other_targets_are_not_swapped(folder: Path, tmp_path: Path) -> None:
    """Nor where there are none: it is said, and nothing has changed."""
    base = opened(folder)
    some, more = (read_lora(base, written(base, tmp_path / targets, 0, targets)) for targets in ("attention", "attention+conv"))
    before = weights(base.denoiser)
    assert not swap_lora(base, some)
    assert same(weights(base.denoiser), before)
    for one, other in ((some, more), (more, some)):
        with loaded_lora(base, one):
            loaded = weights(base.denoiser)
            assert not swap_lora(base, other)
            assert same(weights(base.denoiser), loaded)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_layers_are_read_the_same_with_others_on(wide: Path, tmp_path: Path, quantize: str) -> None:
    """Whether these have the same targets or not."""
    base = opened(wide, quantize=quantize)
    paths = [written(base, tmp_path / str(k), k, targets) for k, targets in enumerate(["attention", "attention+conv", "attention"])]
    expected = [read_lora(base, path) for path in paths]
    for on in expected:
        with loaded_lora(base, on):
            for path, layers in zip(paths, expected, strict=True):
                found = read_lora(base, path)
                assert (found.rank, found.alpha, found.targets) == (layers.rank, layers.alpha, layers.targets)
                assert same(found.tensors, layers.tensors)


def test_layers_in_memory_do_not_change(folder: Path, tmp_path: Path) -> None:
    """Neither when they are loaded, nor when others take their place."""
    base = opened(folder)
    several = [read_lora(base, written(base, tmp_path / str(k), k)) for k in (0, 1)]
    copies = [LoraLayers(one.rank, one.alpha, one.targets, {name: value.clone() for name, value in one.tensors.items()}) for one in several]
    with loaded_lora(base, several[0]):
        for one in (several[1], several[0], several[1]):
            swap_lora(base, one)
            output(base)
    for one, copy in zip(several, copies, strict=True):
        assert same(one.tensors, copy.tensors)


def test_full_weights_take_a_copy_that_is_there(folder: Path, fitted: Callable[..., Adapter]) -> None:
    """The base comes back from it, and no other is made."""
    base = opened(folder)
    before = weights(base.denoiser)
    with loaded_full(base, fitted("full").folder) as own:
        assert same(own, before)
    own["conv_in.bias"] += 1
    with loaded_full(base, fitted("full", 1).folder, own) as again:
        assert again is own
    assert same(weights(base.denoiser), own)
    assert not same(weights(base.denoiser), before)


def test_loading_layers_is_noticed_by_nobody_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The global generator stays as it is, and modules that other threads make meanwhile are as ever."""
    base, seen, ours, reset = opened(folder), set(), torch.nn.Module.register_parameter, torch.nn.Linear.reset_parameters

    def watched(layer: torch.nn.Linear) -> None:
        seen.add(torch.nn.Module.register_parameter)
        reset(layer)

    layers, state = read_lora(base, written(base, tmp_path / "one", 0)), torch.random.get_rng_state()
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", watched)
    with loaded_lora(base, layers):
        assert seen == {ours}
    assert torch.equal(torch.random.get_rng_state(), state)
