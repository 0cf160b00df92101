"""Symbolic tensors: the tape against sums by hand and against autograd, the symbolic models against those of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.optim import Adam8bit
from common import each, opened
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagic_lora.bases.architecture import Architecture, UNetArchitecture
from imagic_lora.bases.layers import ATTENTION, LORA_TARGETS, text_parameters
from imagic_lora.bases.loading.components import TEXT_ENCODERS
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.quantization import quantize_linear
from imagic_lora.core.errors import ImagicError
from imagic_lora.memory.optimizer_states import states_8bit
from imagic_lora.memory.symbolic.layers import LayerOptions, Layers
from imagic_lora.memory.symbolic.tape import ByteCounter, SymbolicTensor, Tape
from imagic_lora.memory.symbolic.unet import UNet
from imagic_lora.memory.symbolic.vae import vae_forward
from imagic_lora.memory.tracker import Tracker

BASES = ["sd15", "sd21", "sdxl", "critters", "tiny"]
TARGETS = {
    "attention": ATTENTION,
    "attention+conv": (*ATTENTION, "conv1", "conv2"),
    "all": LORA_TARGETS["all"],
}


def held(tape: Tape) -> tuple[int, int]:
    """Bytes now and at the most."""
    return tape.counter.now, tape.counter.peak


def test_touched_bytes_raise_the_peak_alone() -> None:
    """They come on top of what is held, and are gone again."""
    counter = ByteCounter()
    counter.add(5)
    counter.add_temporarily(7)
    assert (counter.now, counter.peak) == (5, 12)
    counter.add(-5)
    counter.add_temporarily(11)
    assert (counter.now, counter.peak) == (0, 12)


def test_a_tensor_is_held_as_long_as_somebody_refers_to_it() -> None:
    """Input and output are there together: 10 + 20 of 4 bytes, then 20 + 5."""
    tape = Tape(gradients_on=False)
    x = tape.tensor(10, 4)
    x = tape.op([x], 20, 4, saved=[x])
    x = tape.op([x], 5, 4, saved=[x])
    assert held(tape) == (20, 120)
    del x
    assert held(tape) == (0, 120)


def test_the_tape_keeps_what_the_backward_pass_needs() -> None:
    """40 + 80 + 60 forward; then the output's gradient of 60 and its input's of 80 at once; in the end the output alone."""
    tape = Tape()
    x = tape.tensor(10, 4, needs_grad=True)
    x = tape.op([x], 20, 4, saved=[x])
    x = tape.op([x], 30, 2, saved=[x])
    assert held(tape) == (180, 180)
    tape.backward(x)
    assert held(tape) == (60, 320)


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    """Neither the input nor a weight is trained."""
    tape = Tape()
    x = tape.tensor(10, 4)
    x = tape.op([x], 20, 4, saved=[x], saves_output=True)
    x = tape.op([x], 5, 4, saved=[x])
    assert held(tape) == (20, 120)


def test_an_output_may_be_kept() -> None:
    """The middle one, though its maker let it go."""
    tape = Tape()
    x = tape.tensor(10, 1, needs_grad=True)
    x = tape.op([x], 20, 1, saves_output=True)
    x = tape.op([x], 40, 1)
    assert held(tape) == (60, 60)
    tape.backward(x)
    assert held(tape) == (40, 120)


@each("passes, peak", [(True, 40), (False, 60)])
def test_a_sum_passes_its_gradient_on(passes: bool, peak: int) -> None:
    """No copy for either of its inputs; without that, two."""
    tape = Tape()
    one, two = tape.tensor(10, 1, needs_grad=True), tape.tensor(10, 1, needs_grad=True)
    tape.backward(total := tape.op([one, two], 10, 1, passes_gradient=passes))
    assert tape.counter.peak == peak
    del one, two, total
    assert tape.counter.now == 0


def test_gradients_of_a_tensor_that_is_used_twice_are_added() -> None:
    """Both gradients exist at once: two tensors, the incoming gradient, and both gradients."""
    tape = Tape()
    x = tape.tensor(10, 1, needs_grad=True)
    total = tape.op([tape.op([x], 10, 1), tape.op([x], 10, 1)], 10, 1, passes_gradient=True)
    assert held(tape) == (20, 40)
    tape.backward(total)
    assert held(tape) == (20, 50)


def test_a_gradient_of_another_size_is_not_passed_on() -> None:
    """A concatenation gives each part its own."""
    tape = Tape()
    one, two = tape.tensor(10, 1, needs_grad=True), tape.tensor(20, 1, needs_grad=True)
    tape.backward(tape.op([one, two], 30, 1, passes_gradient=True))
    assert held(tape) == (30, 30 + 30 + 30 + 30)


@each("scratch, peak", [(0, 60), (15, 60), (200, 240)])
def test_scratch_is_held_for_a_moment(scratch: int, peak: int) -> None:
    """In the backward pass, in addition to a tensor and its gradient of 20 each, before the next gradient of 20 exists."""
    tape = Tape()
    x = tape.tensor(20, 1, needs_grad=True)
    x = tape.op([x], 20, 1, scratch=scratch)
    assert held(tape) == (20, 40)
    tape.backward(x)
    assert held(tape) == (20, peak)


@each("frees, scratch, left, peak", [(False, 0, 1200, 1280), (False, 8, 1200, 1280), (True, 0, 0, 480), (True, 8, 0, 1280)])
def test_gradients_of_weights_are_held_or_freed(frees: bool, scratch: int, left: int, peak: int) -> None:
    """Three weights of 400 bytes: all at the end, or one at a time with what its step takes of 8 bytes an element."""
    tape = Tape(frees_gradients=frees, step_scratch=scratch)
    x = tape.tensor(10, 4)
    for _ in range(3):
        x = tape.op([x], 10, 4, weight_gradients=[(100, 4)])
    tape.backward(x)
    del x
    assert held(tape) == (left, peak)


def test_what_does_not_lead_to_the_loss_gets_no_gradient() -> None:
    """Its weight stays without one."""
    tape = Tape()
    x = tape.tensor(10, 1)
    unused, loss = tape.op([x], 10, 1, weight_gradients=[(1000, 1)]), tape.op([x], 10, 1, weight_gradients=[(5, 1)])
    tape.backward(loss)
    del unused, loss, x
    assert held(tape) == (5, 45)


def block(tape: Tape, x: SymbolicTensor) -> SymbolicTensor:
    """Two operations that each keep their input."""
    return tape.op([h := tape.op([x], 10, 1, saved=[x])], 10, 1, saved=[h])


def test_a_checkpointed_part_is_made_again() -> None:
    """Four parts: 9 tensors and 2 gradients at the peak, or 5 tensors, 2 that are made again (or one and its gradient) and a gradient."""
    plain, spared = Tape(), Tape()
    x, y = plain.tensor(10, 1, needs_grad=True), spared.tensor(10, 1, needs_grad=True)
    for _ in range(4):
        x, y = block(plain, x), spared.checkpoint(partial(block, spared), y)
    assert (plain.counter.now, spared.counter.now) == (90, 50)
    plain.backward(x)
    spared.backward(y)
    assert held(plain) == (10, 110)
    assert held(spared) == (10, 80)


def test_a_checkpoint_without_gradients_is_the_part_alone() -> None:
    """Nothing waits for a backward pass."""
    tape = Tape(gradients_on=False)
    x = tape.checkpoint(partial(block, tape), tape.tensor(10, 1, needs_grad=True))
    assert held(tape) == (10, 30)
    del x
    assert tape.counter.now == 0


class Loss(torch.autograd.Function):
    """A scalar whose gradient is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.new_ones(ctx.shape)


def torch_peak(sizes: list[int], rows: int, trained: bool, spared: bool) -> int:
    """The most bytes that a multilayer perceptron takes besides its weights, counted in real tensors."""
    layers = [nn.Linear(a, b, bias=False).requires_grad_(trained) for a, b in pairwise(sizes)]
    with Tracker() as tracker:
        start = x = torch.randn(rows, sizes[0], requires_grad=not trained)
        for layer in layers:
            part = partial(lambda layer, y: F.relu(layer(y)), layer)
            x = checkpoint(part, x, use_reentrant=False) if spared else part(x)
        Loss.apply(x).backward()
        assert start.requires_grad == (start.grad is not None)
    return tracker.peak - sum(layer.weight.numel() * 4 for layer in layers)


def symbolic_peak(sizes: list[int], rows: int, trained: bool, spared: bool) -> int:
    """The same with sizes alone."""
    tape = Tape()
    start = x = tape.tensor(rows * sizes[0], 4, needs_grad=not trained)
    for a, b in pairwise(sizes):

        def part(y: SymbolicTensor, a: int = a, b: int = b) -> SymbolicTensor:
            weight = [(a * b, 4)] if trained else []
            h = tape.op([y], rows * b, 4, [y] if trained else [], weight_gradients=weight)
            return tape.op([h], rows * b, 4, saves_output=True)

        x = tape.checkpoint(part, x) if spared else part(x)
    tape.backward(tape.op([x], 1, 4))
    assert start.needs_grad != trained
    return tape.counter.peak


@each("spared", [False, True])
@each("trained", [False, True])
@each("sizes", [[64] * 7, [16, 64, 256, 64, 16], [512, 64, 8]])
def test_the_tape_is_autograds(sizes: list[int], trained: bool, spared: bool) -> None:
    """But for two scalars, whatever the widths of the layers."""
    assert symbolic_peak(sizes, 100, trained, spared) == pytest.approx(torch_peak(sizes, 100, trained, spared), abs=8)


@pytest.fixture(scope="module")
def known(folder: Path) -> Callable[[str], Architecture]:
    """Gives the architecture of a base."""
    return lambda name: architecture(str(folder) if name == "tiny" else name)


def planned_unet(base: Architecture, checkpointing: bool = False, gradients: bool = False, **numbers: Any) -> Layers:
    """The U-Net, counted."""
    layers = Layers(Tape(gradients_on=gradients), LayerOptions(**({"itemsize": 4, "weight_itemsize": 4} | numbers)))
    UNet(base.denoiser, layers, checkpointing).forward(64, 1, base.conditioning["tokens"][1], False)
    return replace(layers)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return make()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@each("name", BASES)
def test_every_parameter_is_counted(known: Callable[[str], Architecture], name: str) -> None:
    """As many as diffusers and transformers make from the same configs."""
    base = known(name)
    vae = Layers(Tape(gradients_on=False), LayerOptions(4, 4))
    for decode in (False, True):
        vae_forward(base.vae, vae, 64**2, 1, decode)
    assert planned_unet(base).parameters == parameters(on_meta(lambda: UNet2DConditionModel.from_config(base.denoiser)))
    assert vae.parameters == parameters(on_meta(lambda: AutoencoderKL.from_config(base.vae)))
    for part, config in base.text_encoders.items():
        kind = base.encoder_classes[part]
        config_class, model_class = TEXT_ENCODERS[kind]
        given = config_class(**config)
        real = parameters(on_meta(lambda make=model_class, given=given: make(given)))
        assert text_parameters(config, kind) == real


def test_the_published_sizes_are_the_published_ones() -> None:
    """U-Net, text encoders: of the weights on the hub."""
    found = {
        name: [
            planned_unet(base).parameters,
            *(text_parameters(config, base.encoder_classes[part]) for part, config in base.text_encoders.items()),
        ]
        for name, base in PUBLISHED.items()
        if isinstance(base, UNetArchitecture)
    }
    assert found == {
        "sd15": [859_520_964, 123_060_480],
        "sd21": [865_910_724, 340_387_840],
        "sdxl": [2_567_463_684, 123_060_480, 694_659_840],
        "sdxl-turbo": [2_567_463_684, 123_060_480, 694_659_840],
    }


@pytest.mark.slow
@each("targets", list(TARGETS))
@each("name", BASES)
def test_every_lora_parameter_is_counted(known: Callable[[str], Architecture], name: str, targets: str) -> None:
    """As many as PEFT attaches."""
    base = known(name)
    unet: Any = on_meta(lambda: UNet2DConditionModel.from_config(base.denoiser)).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=list(TARGETS[targets])))
    trainable = [p.numel() for p in unet.parameters() if p.requires_grad]
    layers = planned_unet(base, rank=4, targets=TARGETS[targets])
    assert layers.lora == sum(trainable)
    assert layers.lora_states == sum(map(states_8bit, trainable))
    shapes = [p.shape for p in unet.parameters() if p.requires_grad]
    factored = planned_unet(base, rank=4, targets=TARGETS[targets], optimizer="adafactor").lora_states
    assert factored == sum(4 * (shape[0] + shape[1:].numel()) for shape in shapes)
    if (name, targets) == ("sd15", "attention"):
        assert layers.lora == 797_184  # 3.2 MB at rank 4, as everywhere
    if targets == "all":
        kinds = (nn.Linear, nn.Conv2d)
        plain: Any = on_meta(lambda: UNet2DConditionModel.from_config(base.denoiser))
        assert len(trainable) == 2 * sum(isinstance(module, kinds) for module in plain.modules())


def test_checkpointing_counts_nothing_twice(known: Callable[[str], Architecture]) -> None:
    """A pass that will be made again has the parameters and bytes of one that is not."""
    plain, spared = (planned_unet(known("sd15"), on, gradients=True, trained=True) for on in (False, True))
    assert (plain.parameters, plain.bytes, plain.states) == (spared.parameters, spared.bytes, spared.states)
    assert plain.bytes == 4 * 859_520_964
    assert spared.tape.counter.peak < 0.4 * plain.tape.counter.peak


@each("itemsize", [2, 4])
def test_bytes_are_those_of_the_precision(known: Callable[[str], Architecture], itemsize: int) -> None:
    """In fp16 half of fp32."""
    assert planned_unet(known("sd15"), weight_itemsize=itemsize).bytes == itemsize * 859_520_964


@each("size", [1, 4095, 4096, 4097, 65_536, 100_000])
def test_8bit_states_are_bitsandbytes_own(size: int) -> None:
    """Both states and their scales; the tables that all parameters share are left out."""
    parameter = nn.Parameter(torch.zeros(size))
    optimizer = Adam8bit([parameter], lr=1e-3)
    parameter.grad = torch.ones(size)
    optimizer.step()
    state = optimizer.state[parameter]
    own = [value for name, value in state.items() if isinstance(value, Tensor) and not name.startswith("qmap")]
    assert sum(value.numel() * value.element_size() for value in own) == states_8bit(size)


def test_8bit_weights_are_those_of_the_layer() -> None:
    """A byte a weight, a scale for every row and the bias as it is; a pass holds the weight in its precision for its duration."""
    model = nn.Sequential(nn.Linear(40, 64, dtype=torch.bfloat16))
    quantize_linear(model, "int8", torch.bfloat16, torch.device("cpu"))
    layers = Layers(Tape(gradients_on=False), LayerOptions(2, 2, quantize="int8"))
    layers.linear(layers.tape.tensor(40, 2), 40, 64)
    assert layers.bytes == sum(value.nbytes for value in (*model.parameters(), *model.buffers())) == 40 * 64 + 64 * 4 + 64 * 2
    assert layers.tape.counter.peak >= 2 * 40 * 64


@each("inside, outside", [(320, 1280), (64, 8), (40, 64)])
def test_4bit_weights_are_bitsandbytes_own(inside: int, outside: int) -> None:
    """Half a byte a weight, a scale for every 64 and the bias as it is; layers that are not quantised in whole."""
    model = nn.Sequential(nn.Linear(inside, outside, dtype=torch.bfloat16))
    quantize_linear(model, "nf4", torch.bfloat16, torch.device("cpu"))
    layer: Any = model[0]
    packed = getattr(layer.weight, "quant_state", None)
    assert (packed is None) == (inside == 40)
    layers = Layers(Tape(gradients_on=False), LayerOptions(2, 2, quantize="nf4"))
    layers.linear(layers.tape.tensor(inside, 2), inside, outside)
    assert layers.bytes == layer.weight.nbytes + layer.bias.nbytes + (packed.absmax.nbytes if packed else 0)
    assert layers.parameters == inside * outside + outside


def test_an_unknown_block_is_rejected(known: Callable[[str], Architecture]) -> None:
    """The error names the supported blocks and the remedy."""
    config = known("sd15").denoiser | {"down_block_types": ["AttnDownBlock2D", *["DownBlock2D"] * 3]}
    with pytest.raises(ImagicError, match=r"AttnDownBlock2D.*CrossAttnDownBlock2D.*--preset 8gb"):
        UNet(config, Layers(Tape(), LayerOptions(4, 4)), False)


def test_a_real_base_has_these_weights(folder: Path) -> None:
    """The tiny base as it is loaded, in bytes."""
    base = opened(folder)
    real = sum(p.numel() * p.element_size() for p in base.denoiser.parameters())
    assert planned_unet(base.architecture).bytes == real
