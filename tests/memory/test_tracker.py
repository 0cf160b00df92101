"""Memory: what the tracker counts, and what each lever saves, in bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import opened, output, same, weights
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Conv2d, Linear, Module, Parameter

from imagic_lora.adapters.full import unfrozen
from imagic_lora.adapters.lora import attached
from imagic_lora.bases.base import Base
from imagic_lora.core.config import Mode, TuneConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import Processes, resolve_runtime
from imagic_lora.memory.tracker import Tracker
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.tune import tune_stage
from imagic_lora.training.updating.optimizers import build_optimizer

STOCHASTIC = {"dtype": "bf16", "master_weights": "bf16-stochastic"}
LORA: dict[Mode, dict[str, Any]] = {"lora": {"rank": 64, "targets": "attention+conv"}, "full": {}}
real_and_fake = pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode], ids=["real", "fake"])


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def noised_latents(side: int, batch: int) -> Tensor:
    """Fixed numbers of that shape."""
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Step:
    """Bytes of a training step.

    Args:
        weights: of the denoiser, with LoRA layers where it has them.
        trained: of each trainable, by name.
        before, after, peak: held before and after the second step, and at most during it.
    """

    weights: int
    trained: dict[str, int]
    before: int
    after: int
    peak: int

    @property
    def all_but_one(self) -> int:
        """Of all gradients less the largest."""
        return sum(self.trained.values()) - max(self.trained.values())


@cache
def measured(folder: Path, mode: Mode = "full", side: int = 2, batch: int = 1, helpers: bool = False, **memory) -> Step:
    """The second step of a tuning stage, counted; latents of 2 x 2 leave next to nothing but weights, gradients and states."""
    base = opened(folder, mode, **memory)
    text = base.encode_prompt("a cat")
    config = TuneConfig.model_validate({"mode": mode, "steps": 5, "batch_size": batch} | LORA[mode])
    tracker = Tracker()
    if helpers:
        adopt_helpers(tracker, base)
    base.offload_encoders()
    with unfrozen(base, restore=False) if mode == "full" else attached(base, config, 0) as parameters:
        held = [*base.denoiser.parameters(), *scales(base.denoiser)]
        tracker.adopt(held)
        stage = tune_stage(base, noised_latents(side, 1), text, parameters, config, 0, Processes())
        with tracker:
            stage.step(0)
            tracker.reset_peak()
            before = tracker.now
            stage.step(1)
            trained = {name: size([weight]) for name, weight in parameters.items()}
            return Step(size(held), trained, before, tracker.now, tracker.peak)


def adopt_helpers(tracker: Tracker, base: Base) -> None:
    """Counts text encoder and VAE."""
    pipe: Any = base.pipeline("text2image")
    for module in (base._helpers["text_encoder"], pipe.vae):
        tracker.adopt([*module.parameters(), *module.buffers()])


def scales(module: Module) -> list[Tensor]:
    """The scales of the 4-bit layers."""
    found = [weight.quant_state for weight in module.parameters() if hasattr(weight, "quant_state")]
    return [state.absmax for state in found]


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that a call holds, its result included."""
    with Tracker() as tracker:
        _result = run()
        return tracker.peak


@real_and_fake
def test_a_known_sequence(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """Storages count once, as long as a tensor of any kind holds them."""
    with mode(), Tracker() as tracker:
        a = torch.empty(100)
        history = [tracker.now]  # 400
        view = a.view(10, 10)[2:, ::2]
        a.add_(1)
        view.mul_(2)
        history.append(tracker.now)  # 400: a view and what is done in place take nothing
        b = a.to(torch.float64)
        history.append(tracker.now)  # 1200
        del a
        history.append(tracker.now)  # 1200: the view holds it
        del view
        history.append(tracker.now)  # 800
        b.exp().add(1)
        history.append(tracker.now)  # 800, but 2400 for a moment
        wide = torch.zeros(1, dtype=torch.uint8).expand(1000)
        history.append(tracker.now)  # 801: expanding takes nothing
        parts = torch.arange(8, dtype=torch.int16).chunk(4)
        history.append(tracker.now)  # 817: one storage in four parts
        both = [torch.var_mean(b)]
        history.append(tracker.now)  # 833: two outputs
        del b, wide, parts, both
        history.append(tracker.now)
    assert history == [400, 400, 1200, 1200, 800, 800, 801, 817, 833, 0]
    assert tracker.peak == 2400


@real_and_fake
def test_what_autograd_keeps_counts(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """An activation that only the graph holds, until the backward pass lets it go and leaves a gradient."""
    with mode(), Tracker() as tracker:
        x = torch.ones(100, requires_grad=True)
        y = x.exp()
        loss = y.sum()
        del y
        history = [tracker.now]
        tracker.reset_peak()
        loss.backward()
        history += [tracker.now, tracker.peak]
        x.grad = None
        history.append(tracker.now)
        x.data = x.data.new_empty(10)
        history.append(tracker.now)
    assert history == [804, 804, 1208, 404, 44]


@real_and_fake
def test_a_peak_that_is_reset_starts_from_what_is_held(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """Not from nothing; and it is a peak of its own."""
    with mode(), Tracker() as tracker:
        kept = torch.empty(10, dtype=torch.uint8)
        torch.empty(1000, dtype=torch.uint8)
        assert (tracker.now, tracker.peak) == (10, 1010)
        tracker.reset_peak()
        assert (tracker.now, tracker.peak) == (10, 10)
        torch.empty(100, dtype=torch.uint8)
        assert (tracker.now, tracker.peak) == (10, 110)
    del kept
    assert (tracker.now, tracker.peak) == (0, 110)  # what goes after the tracker was left is taken off


def test_what_was_there_counts_once_it_is_adopted() -> None:
    """Each storage once and whole, however often it is adopted or seen again; it is taken off when it goes."""
    part = Tracker()
    part.adopt([torch.empty(100)[2:4]])
    assert (part.now, part.peak) == (0, 400)
    module = Linear(10, 20)
    tied = [module.weight, module.weight.view(-1), module.bias]
    tracker = Tracker()
    tracker.adopt(tied)
    tracker.adopt(module.parameters())
    assert tracker.now == tracker.peak == 4 * (200 + 20)
    with tracker:
        out = module(torch.ones(1, 10))
        assert tracker.now == 4 * (200 + 20 + 10 + 20)  # and the input, which the graph holds
    del out, module, tied
    assert tracker.now == 0


def test_a_made_up_run_counts_like_a_real_one() -> None:
    """Layers, backward pass, and either optimiser: fake tensors take what real ones take, step by step."""

    def history(optimizer: str) -> list[tuple[int, int]]:
        found = []
        with Tracker() as tracker:
            model = torch.nn.Sequential(Conv2d(3, 16, 3), torch.nn.GroupNorm(4, 16), torch.nn.SiLU(), torch.nn.Flatten(), Linear(576, 10))
            updates = build_optimizer(optimizer, model.parameters(), 0.1)
            for _ in range(2):
                model(torch.ones(2, 3, 8, 8)).square().mean().backward()
                found.append((tracker.now, tracker.peak))
                updates.step()
                updates.zero_grad()
                found.append((tracker.now, tracker.peak))
                tracker.reset_peak()
        return found

    with FakeTensorMode():
        fake = history("adam")
    assert fake == history("adam")
    parameters = 4 * (16 * 3 * 9 + 16 + 2 * 16 + 5760 + 10)
    assert fake[-1][0] == 3 * parameters + 6 * 4  # weights and two moments, and the count of steps of each of the six


def test_a_step_holds_weights_gradients_and_states(folder: Path) -> None:
    """Plain Adam in fp32: between steps weights and two moments; at the peak the gradients too, and little else."""
    step = measured(folder)
    assert step.weights == sum(step.trained.values())
    assert step.before == step.after
    assert 0 <= step.after - 3 * step.weights < 0.02 * step.weights
    assert 0 <= step.peak - 4 * step.weights < 0.03 * step.weights


@cache
def saved_for_backward(folder: Path, side: int, batch: int, **memory) -> tuple[int, int]:
    """Bytes that a forward pass saves for the backward pass, and those of the block that saves most, by PyTorch's own hooks."""
    base = opened(folder, "full", **memory)
    everything: dict[int, int] = {}
    blocks: list[dict[int, int]] = []
    found = [everything]  # where what is saved is written down: a block's own dict while it runs

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        for one in found:
            one[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_: Any) -> None:
        blocks.append({})
        found.append(blocks[-1])

    def leave(*_: Any) -> None:
        found.pop()

    for module in base.denoiser.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    times = torch.linspace(0, 0.9, batch, dtype=torch.float64)
    with unfrozen(base, restore=False) as parameters, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = denoising_loss(base, noised_latents(side, 1), base.encode_prompt("a cat"), noised_latents(side, batch), times)
        assert loss.requires_grad
        own = {weight.untyped_storage().data_ptr() for weight in parameters.values()}
    sizes = [sum(nbytes for place, nbytes in one.items() if place not in own) for one in (everything, *blocks)]
    return sizes[0], max(sizes[1:])


def test_gradient_checkpointing_saves_the_activations(folder: Path) -> None:
    """All that the blocks save for the backward pass, less what the largest of them saves again."""
    everything, largest = saved_for_backward(folder, 16, 4)
    remaining, _ = saved_for_backward(folder, 16, 4, gradient_checkpointing=True)
    expected = everything - remaining - largest
    assert expected > 0.5 * everything
    plain, spared = (measured(folder, "full", side=16, batch=4, gradient_checkpointing=on) for on in (False, True))
    assert spared.before == plain.before
    assert plain.peak - spared.peak >= 0.9 * expected


def test_8bit_states_save_three_quarters_of_the_large_ones(folder: Path) -> None:
    """To the byte: two states of four bytes a weight become two of one byte and a scale for 256, and PyTorch's counts of steps go."""
    wide, narrow = (measured(folder, "lora", optimizer=name) for name in ("adam", "adam8bit"))
    counts = [nbytes // 4 for nbytes in wide.trained.values()]
    expected = sum(2 * (3 * count - 4 * ceil(count / 256)) for count in counts if count >= 4096) + 4 * len(counts)
    assert wide.after - narrow.after == wide.peak - narrow.peak == expected > 0


def test_the_optimiser_inside_the_backward_pass_saves_the_gradients(folder: Path) -> None:
    """All but the largest of them."""
    plain, spared = (measured(folder, optimizer_in_backward=inside) for inside in (False, True))
    assert spared.before == plain.before
    assert plain.peak - spared.peak >= 0.9 * plain.all_but_one


def test_master_weights_in_bf16_save_half_of_weights_and_gradients(folder: Path) -> None:
    """Weights to the byte; at the peak half of either, less the fp32 copies of one weight and one gradient at a time."""
    wide, narrow = measured(folder, dtype="bf16"), measured(folder, **STOCHASTIC)
    assert wide.weights == 2 * narrow.weights
    assert wide.before - narrow.before == narrow.weights
    copies = 2 * max(wide.trained.values())
    assert wide.peak - narrow.peak >= 0.9 * (2 * narrow.weights - copies)


def test_master_weights_in_bf16_save_half_of_the_weights_inside_the_backward_pass(folder: Path) -> None:
    """Where no gradients are held, and autocast's copies are not made."""
    wide, narrow = (measured(folder, optimizer_in_backward=True, **memory) for memory in ({"dtype": "bf16"}, STOCHASTIC))
    assert wide.peak - narrow.peak >= 0.9 * narrow.weights


@pytest.mark.slow
def test_autocast_without_its_cache_saves_a_copy_of_the_denoiser(folder: Path) -> None:
    """In half precision: all of it in a pass without gradients but the layer at hand, most of it where activations are made again."""
    found = {}
    for on in (False, True):
        base = opened(folder, "full", dtype="bf16", autocast_cache=on)
        text, latents = base.encode_prompt("a cat"), noised_latents(2, 1)
        with unfrozen(base, restore=False), torch.no_grad():
            found[on] = peak_of(lambda base=base, latents=latents, text=text: base.predict(latents, torch.tensor([5]), text))
            layers = [layer for layer in base.denoiser.modules() if isinstance(layer, Linear | Conv2d)]
            casts = [size([weight]) // 2 for layer in layers for weight in layer.parameters()]
    assert found[True] - found[False] >= 0.9 * (sum(casts) - max(casts))
    kept, freed = (
        measured(folder, dtype="bf16", gradient_checkpointing=True, optimizer_in_backward=True, autocast_cache=on) for on in (True, False)
    )
    assert kept.before == freed.before
    assert kept.peak - freed.peak >= 0.5 * sum(casts)


def test_4_bits_save_three_quarters_of_the_linear_layers(wide: Path) -> None:
    """Of a bf16 base: two bytes a weight become half a byte and the scales, and the step that trains LoRA layers takes that much less."""
    plain, spared = (measured(wide, "lora", dtype="bf16", quantize=name) for name in ("none", "nf4"))
    linear = [layer.weight.numel() for layer in opened(wide).denoiser.modules() if isinstance(layer, Linear)]
    shared = sum(4 * ceil(count / 64) for count in linear)
    expected = sum(2 * count - count // 2 for count in linear) - shared
    assert plain.weights - spared.weights == plain.before - spared.before == expected
    assert plain.peak - spared.peak >= 0.9 * expected


def helper_of(base: Base, name: str) -> Any:
    """The VAE or the text encoder."""
    base.pipeline("text2image")  # loads the VAE
    return base._helpers[name]  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_released_is_gone(folder: Path) -> None:
    """No VAE, no text encoder, and not a byte of theirs, without waiting for the garbage collector; the denoiser stays."""
    base, tracker = opened(folder, idle="release"), Tracker()
    modules = [weakref.ref(module) for module in base._helpers.values()]  # pyright: ignore[reportAttributeAccessIssue]
    expected = 0
    for module in base._helpers.values():  # pyright: ignore[reportAttributeAccessIssue]
        own = [*module.parameters(), *module.buffers()]
        tracker.adopt(own)
        expected += size(own)
    del module, own
    assert tracker.now == expected > 0
    tracker.adopt(base.denoiser.parameters())
    gc.disable()
    try:
        base.offload_encoders()
        gone = [one() is None for one in modules], tracker.now
    finally:
        gc.enable()
    assert gone == ([True, True], size(base.denoiser.parameters()))
    base.offload_encoders()  # a second time there is nothing to do


def test_idle_helpers_take_no_part_in_the_peak(folder: Path) -> None:
    """The same step takes less by exactly their size."""
    kept, released = (measured(folder, helpers=True, idle=idle) for idle in ("keep", "release"))
    base = opened(folder)
    expected = sum(size([*module.parameters(), *module.buffers()]) for module in (helper_of(base, "vae"), helper_of(base, "text_encoder")))
    assert kept.peak - released.peak == kept.before - released.before == expected > 0


def everything(base: Base) -> dict[str, Tensor]:
    """All that a base answers."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return {
        "text": base.encode_prompt("a dog").tokens,
        "latents": base.encode_image(pixels),
        "picture": base.decode(noised_latents(8, 2)),
        "denoiser": output(base),
    }


def test_what_comes_back_is_what_was_released(folder: Path) -> None:
    """Texts, latents and pictures are bit-equal, weights too, whichever is asked for first; and it stays frozen."""
    expected = everything(opened(folder))
    base = opened(folder, idle="release")
    before = {name: weights(helper_of(base, name)) for name in ("vae", "text_encoder")}
    for _ in range(2):
        base.offload_encoders()
        assert same(everything(base), expected)
    for name, state in before.items():
        module = helper_of(base, name)
        assert same(weights(module), state)
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())


def test_helpers_that_are_kept_stay(folder: Path) -> None:
    """The same modules after offloading."""
    base = opened(folder)
    before = [helper_of(base, name) for name in ("vae", "text_encoder")]
    base.offload_encoders()
    assert all(helper_of(base, name) is module for name, module in zip(("vae", "text_encoder"), before, strict=True))


def test_a_released_vae_comes_back_with_its_levers(folder: Path) -> None:
    """Tiling and slicing are asked for again."""
    base = opened(folder, idle="release", vae_tiling=True, vae_slicing=True)
    base.offload_encoders()
    vae = helper_of(base, "vae")
    assert vae.use_tiling
    assert vae.use_slicing


def test_offloading_is_rejected_without_a_card(folder: Path) -> None:
    """With what spares host memory instead."""
    with pytest.raises(ImagicError, match=r"--idle offload without CUDA.*--idle release"):
        resolve_runtime(MemoryConfig(device="cpu", idle="offload"))


def test_offloading_moves_the_helpers_and_brings_the_denoiser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the CPU when the denoiser is needed, and back to the device when a helper is used. The device is PyTorch's ``meta`` here."""
    base = opened(folder)
    device = torch.device("meta")
    base.runtime = replace(base.runtime, device=device, memory=base.runtime.memory.model_copy(update={"idle": "offload"}))
    vae, text_encoder = (base._helpers[name] for name in ("vae", "text_encoder"))  # pyright: ignore[reportAttributeAccessIssue]
    moves = []
    for name, module in {"vae": vae, "text_encoder": text_encoder, "denoiser": base.denoiser}.items():

        def moved(where: torch.device, name: str = name, module: Any = module, own: Any = module.to) -> Any:
            moves.append((name, str(where)))
            return own(where) if where == device else module.to_empty(device=where)  # the device meta has no data to bring back

        monkeypatch.setattr(module, "to", moved)
    base.offload_encoders()
    assert moves == [("denoiser", "meta")]
    picture = base.decode(noised_latents(8, 1))
    assert moves[1:] == [("vae", "meta")]
    base.offload_encoders()
    assert moves[2:] == [("vae", "cpu")]
    assert (picture.device, picture.shape) == (device, (1, 3, 32, 32))
    assert base._helpers == {"vae": vae, "text_encoder": text_encoder}  # pyright: ignore[reportAttributeAccessIssue]
    assert (text_encoder.device.type, base.denoiser.device.type) == ("cpu", "meta")


def test_slicing_decodes_one_by_one(folder: Path) -> None:
    """The same pictures, from the memory of one decoding and the pictures themselves."""
    latents = noised_latents(8, 4)
    plain, sliced = opened(folder), opened(folder, vae_slicing=True)
    pictures = plain.decode(latents)
    torch.testing.assert_close(sliced.decode(latents), pictures, rtol=1e-5, atol=1e-5)
    four, one, spared = (
        peak_of(lambda: plain.decode(latents)),
        peak_of(lambda: plain.decode(noised_latents(8, 1))),
        peak_of(lambda: sliced.decode(latents)),
    )
    assert four > 3.8 * one
    assert four - spared >= 0.9 * (four - one - size([pictures]))


def test_tiling_decodes_tile_by_tile(folder: Path) -> None:
    """Latents of 32 x 32 in tiles of 8 x 8 that overlap by a quarter: the memory of one tile, of all tiles' pixels, and of the picture."""
    latents = noised_latents(32, 1)
    first = latents[..., :8, :8].clone()
    plain, tiled = opened(folder), opened(folder, vae_tiling=True)
    picture = tiled.decode(latents)
    assert picture.shape == plain.decode(latents).shape == (1, 3, 128, 128)
    corner = plain.decode(first)
    torch.testing.assert_close(picture[..., :24, :24], corner[..., :24, :24], rtol=1e-5, atol=1e-5)  # before the blending begins
    whole, tile, spared = (
        peak_of(lambda: plain.decode(latents)),
        peak_of(lambda: plain.decode(first)),
        peak_of(lambda: tiled.decode(latents)),
    )
    tiles = ceil(32 / 6) ** 2 * size([corner])
    assert whole > 15 * tile
    assert whole - spared >= 0.9 * (whole - tile - tiles - size([picture]))


def test_tiling_leaves_small_pictures_alone(folder: Path) -> None:
    """What fits a tile is bit-equal, and takes what it took."""
    latents = noised_latents(8, 2)
    plain, tiled = opened(folder), opened(folder, vae_tiling=True)
    assert torch.equal(tiled.decode(latents), plain.decode(latents))
    assert peak_of(lambda: tiled.decode(latents)) == peak_of(lambda: plain.decode(latents))


def test_parameters_held_by_nobody_are_not_counted() -> None:
    """A weight that is let go inside is taken off at once, with its gradient."""
    weight = Parameter(torch.ones(1000))
    tracker = Tracker()
    tracker.adopt([weight])
    with tracker:
        weight.square().sum().backward()
        assert tracker.now == 8000
        del weight
        assert tracker.now == 0
