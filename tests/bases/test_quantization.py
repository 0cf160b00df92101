"""A base in 4 bits: what is quantised and how well, LoRA on it, and LoRA of it on a base that is not quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from common import opened, output, same, weights
from diffusers import StableDiffusionPipeline
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Conv2d, Linear, Module, Sequential

from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.lora import attached, save_lora
from imagic_lora.bases.base import Base
from imagic_lora.bases.quantization import Int8Linear, quantize_linear
from imagic_lora.core.config import EmbedConfig, TuneConfig
from imagic_lora.core.runtime import Processes
from imagic_lora.memory.tracker import Tracker
from imagic_lora.training.embed import embed_stage
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.stage import Stage, train
from imagic_lora.training.tune import tune_stage

CONFIG = TuneConfig(steps=6, learning_rate=0.02, batch_size=2, rank=4, alpha=2.0, targets="attention+conv")
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
NF4 = torch.tensor(  # appendix E of arXiv 2305.14314
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def off(found: Tensor, expected: Tensor) -> float:
    """The relative error of all of it."""
    return ((found - expected).norm() / expected.norm()).item()


def layers(module: Module, kind: type[Module]) -> dict[str, Any]:
    """The layers of a kind by name, those of its subclasses left out."""
    return {name: layer for name, layer in module.named_modules() if type(layer) is kind}


def loss_of(base: Base, stage: Stage) -> Tensor:
    """On noise and times that are not those of the training."""
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    times = torch.arange(16, dtype=torch.float64) / 16
    return denoising_loss(base, LATENTS, stage.conditioning(), noise, times).mean()


def test_linear_layers_are_in_4_bits_and_nothing_else_is(wide: Path) -> None:
    """Every linear layer by its name; convolutions, norms and biases bit-equal, and all frozen."""
    plain, base = opened(wide).denoiser, opened(wide, quantize="nf4").denoiser
    before, found = layers(plain, Linear), layers(base, Linear4bit)
    assert list(found) == list(before)
    assert not layers(base, Linear)
    for name, layer in found.items():
        assert (layer.weight.dtype, layer.weight.quant_state.quant_type) == (torch.uint8, "nf4")
        assert layer.weight.numel() == before[name].weight.numel() / 2
        assert layer.weight.quant_state.shape == before[name].weight.shape
    assert not any(weight.requires_grad for weight in base.parameters())
    untouched = {name: value for name, value in weights(plain).items() if name.removesuffix(".weight") not in before}
    assert len(layers(plain, Conv2d)) > 20
    assert same({name: value for name, value in weights(base).items() if name in untouched}, untouched)


@pytest.mark.parametrize(
    "features",
    [64, 320, 768],
)
def test_weights_are_the_nearest_of_the_sixteen(features: int) -> None:
    """Each the nearest of NF4's levels times a scale, the largest of its 64 weights."""
    plain = Linear(features, 64)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(64, features, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 1, 64)[:, None])
    blocks = plain.weight.detach().clone().view(-1, 64)
    module = Sequential(plain)
    quantize_linear(module, "nf4", torch.float32, torch.device("cpu"))
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks / largest).unsqueeze(-1).sub(NF4).abs().argmin(-1)]
    with torch.no_grad():
        found = (module(torch.eye(features)) - plain.bias).T.reshape(-1, 64)
    scales = found.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales, largest, rtol=0, atol=0.01 * largest.max().item())
    torch.testing.assert_close(found / scales, nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [32, 96])
def test_rows_that_are_not_whole_blocks_stay_as_they_are(features: int) -> None:
    """bitsandbytes 0.50.2 takes wrong scales for them on a CPU."""
    module = Sequential(Linear(features, 64))
    before = weights(module)
    quantize_linear(module, "nf4", torch.float32, torch.device("cpu"))
    assert type(module[0]) is Linear
    assert same(weights(module), before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_answer_is_near_that_of_the_base(wide: Path, dtype: str) -> None:
    """Some percent off, whatever precision it computes in."""
    exact, base = opened(wide), opened(wide, dtype=dtype, quantize="nf4")
    assert {layer.compute_dtype for layer in layers(base.denoiser, Linear4bit).values()} == {base.runtime.dtype}
    assert 0.01 < off(output(base).float(), output(exact)) < 0.15


@pytest.mark.parametrize("features", [5, 64, 320])
def test_8_bits_are_the_nearest_steps_of_a_row(features: int) -> None:
    """In float64: each row in steps of a 127th of its largest value; a row of zeros stays zero. Gradients are those of these weights."""
    plain = Linear(features, 8).double()
    with torch.no_grad():
        plain.weight.mul_(torch.logspace(-6, 6, 8)[:, None])[3] = 0
    exact, bias, x = plain.weight.detach().clone(), plain.bias.detach().clone(), torch.randn(2, 3, features, dtype=torch.float64)
    steps = exact.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(steps > 0, (exact / steps).round() * steps, 0.0)
    module = Sequential(plain)
    quantize_linear(module, "int8", torch.float64, torch.device("cpu"))
    assert type(module[0]) is Int8Linear
    assert module[0].weight.dtype == torch.int8
    x.requires_grad_()
    found = module(x)
    torch.testing.assert_close(found, x @ rounded.T + bias, rtol=1e-6, atol=1e-12 + 1e-6 * exact.abs().max().item())
    (own,) = torch.autograd.grad((found * found.detach()).sum(), x)
    (expected,) = torch.autograd.grad(((x @ rounded.T + bias) * found.detach()).sum(), x)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_8_bits_are_nearer_than_4(wide: Path, dtype: str) -> None:
    """Every linear layer, and LoRA on them: its loss falls, and the base answers as before when the layers are gone."""
    exact, base = opened(wide), opened(wide, dtype=dtype, quantize="int8")
    assert list(layers(base.denoiser, Int8Linear)) == list(layers(exact.denoiser, Linear))
    assert base.denoiser.dtype == base.runtime.dtype
    first = output(base)
    assert 1e-4 < off(first.float(), output(exact)) < 0.02
    text = base.encode_prompt("a cat")
    with attached(base, CONFIG, 0) as parameters:
        stage = tune_stage(base, LATENTS, text, parameters, CONFIG, 0, Processes())
        start = loss_of(base, stage).item()
        list(train(stage))
        assert loss_of(base, stage).item() < start
    assert torch.equal(output(base), first)


def test_it_is_the_same_every_time(wide: Path) -> None:
    """Bit for bit, loaded anew or asked again."""
    base = opened(wide, quantize="nf4")
    first = output(base)
    assert torch.equal(output(base), first)
    assert torch.equal(output(opened(wide, quantize="nf4")), first)


def test_gradients_are_near_those_of_the_base(wide: Path) -> None:
    """Of LoRA layers below and above 4-bit layers, and of the embedding, which reaches the loss through them."""
    found = {}
    for quantize in ("none", "nf4"):
        base = opened(wide, quantize=quantize)
        text = base.encode_prompt("a cat")
        stage = embed_stage(base, LATENTS, text, EmbedConfig(), 0, Processes())
        loss_of(base, stage).backward()
        tokens = stage.trainables["tokens"].grad
        assert tokens is not None
        with attached(base, CONFIG, 0) as parameters:
            loss_of(base, tune_stage(base, LATENTS, text, parameters, CONFIG, 0, Processes())).backward()
            own = torch.cat([weight.grad.flatten() for weight in parameters.values() if weight.grad is not None])
            assert len(own) == sum(weight.numel() for weight in parameters.values())
        found[quantize] = tokens, own
    for one, other in zip(found["nf4"], found["none"], strict=True):
        assert 0.01 < off(one, other) < 0.4


def test_pictures_before_the_training_do_not_change_its_gradients(wide: Path) -> None:
    """Bit for bit: on some CPUs bitsandbytes would pack the weights for inference, and then has no gradients for them."""
    found = []
    for pictures in (0, 2):
        base = opened(wide, quantize="nf4")
        for _ in range(pictures):
            output(base)
        with attached(base, CONFIG, 0) as parameters:
            stage = tune_stage(base, LATENTS, base.encode_prompt("a cat"), parameters, CONFIG, 0, Processes())
            loss_of(base, stage).backward()
            found.append({name: weight.grad for name, weight in parameters.items() if weight.grad is not None})
            assert len(found[-1]) == len(parameters)
    assert same(found[0], found[1])


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("embed", {}),
        pytest.param("tune", {}, marks=pytest.mark.slow),
        ("tune", {"optimizer": "adam8bit", "optimizer_in_backward": True, "gradient_checkpointing": True}),
    ],
    ids=["embed", "tune", "tune-with-levers"],
)
def test_training_lowers_the_loss_and_leaves_the_base(wide: Path, name: str, memory: dict[str, Any]) -> None:
    """On other noise; codes and scales keep their bits, and the base answers as before when the layers are gone."""
    base = opened(wide, quantize="nf4", **memory)
    before, first, text = weights(base.denoiser), output(base), base.encode_prompt("a cat")
    with attached(base, CONFIG, 0) as parameters:
        if name == "embed":
            config = EmbedConfig(steps=CONFIG.steps, learning_rate=0.2, batch_size=2)
            stage = embed_stage(base, LATENTS, text, config, 0, Processes())
        else:
            stage = tune_stage(base, LATENTS, text, parameters, CONFIG, 0, Processes())
        assert {weight.dtype for weight in stage.trainables.values()} == {torch.float32}
        assert len(layers(base.denoiser, AdaptedLinear4bit)) == 4 * 8  # PEFT's own layers for such a base: eight attentions of four each
        with torch.no_grad():
            start = loss_of(base, stage)
        list(train(stage))
        with torch.no_grad():
            assert loss_of(base, stage) < 0.985 * start
        now = {key.replace(".base_layer", ""): value for key, value in weights(base.denoiser).items() if ".lora_" not in key}
        assert same(now, before)
        assert torch.equal(output(base), first) == (name == "embed")
    assert torch.equal(output(base), first)
    assert list(layers(base.denoiser, Linear4bit)) == list(layers(opened(wide).denoiser, Linear))


def test_its_layers_load_into_a_base_that_is_not_quantised(wide: Path, tmp_path: Path) -> None:
    """Plain diffusers reads them bit-exact with their scale, and they do there what they did here."""
    base = opened(wide, quantize="nf4")
    untuned = output(base)
    with attached(base, CONFIG, 0) as parameters:
        list(train(tune_stage(base, LATENTS, base.encode_prompt("a cat"), parameters, CONFIG, 0, Processes())))
        tuned = output(base)
        save_lora(base, AtomicWriter(tmp_path))
        stored = {name.replace(".imagic.", "."): weight.detach().clone() for name, weight in parameters.items()}
    pipe: Any = StableDiffusionPipeline.from_pretrained(wide, local_files_only=True, use_safetensors=True)
    exact = opened(wide)
    text = exact.encode_prompt("a cat").tokens.expand(2, -1, -1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))

    def answer() -> Tensor:
        with torch.no_grad():
            return pipe.unet(noise, torch.tensor([10, 700]), text).sample

    before = answer()
    assert torch.equal(before, output(exact))
    pipe.load_lora_weights(tmp_path, adapter_name="cat")
    read = {name.replace(".cat.", "."): value for name, value in weights(pipe.unet).items() if ".lora_" in name}
    assert same(dict(sorted(read.items())), dict(sorted(stored.items())))
    scales = {layer.scaling["cat"] for layer in pipe.unet.modules() if hasattr(layer, "scaling")}
    assert scales == {0.5}  # alpha 2 over rank 4
    change, expected = answer() - before, tuned - untuned
    assert expected.norm() > 0.1 * untuned.norm()
    assert off(change, expected) < 0.25


def held(module: Module) -> int:
    """Bytes of a module, its scales and tables among them."""
    found = {weight.untyped_storage()._cdata: weight.untyped_storage().nbytes() for weight in module.parameters()}
    states = [weight.quant_state for weight in module.parameters() if hasattr(weight, "quant_state")]
    for state in states:
        for one in (state.absmax, state.code):
            found[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(found.values())


def some_layers() -> Sequential:
    """Large enough for tables to be small beside weights."""
    return Sequential(Linear(512, 512), Linear(512, 1024, bias=False), Conv2d(4, 4, 3))


def test_a_linear_layer_takes_little_more_than_a_quarter_of_fp16() -> None:
    """Half a byte a weight, four bytes for the scale of 64, and 64 bytes of a table a layer."""
    module, count = some_layers(), 512 * 512 + 512 * 1024
    rest = held(module) - 4 * count
    quantize_linear(module, "nf4", torch.bfloat16, torch.device("cpu"))
    found = held(module) - rest
    assert found == count // 2 + 4 * count // 64 + 2 * 64
    assert found < 0.29 * 2 * count


def test_a_plan_takes_its_layers_for_what_they_are(wide: Path) -> None:
    """The stand-ins of a rehearsal hold what 4-bit layers hold but for their tables, and unpack a weight for a moment either way."""
    real = some_layers()
    quantize_linear(real, "nf4", torch.float32, torch.device("cpu"))
    with FakeTensorMode():
        fake = some_layers()
        quantize_linear(fake, "nf4", torch.float32, torch.device("cpu"))
        assert not layers(fake, Linear)
        planned = sum(weight.untyped_storage().nbytes() for weight in (*fake.parameters(), *fake.buffers()))
        assert held(real) - 2 * 64 == planned
        x = torch.ones(3, 512, requires_grad=True)
        with Tracker() as tracker:
            out = fake[0](x)
            assert (out.shape, tracker.now) == ((3, 512), 4 * 3 * 512)
            assert tracker.peak >= 4 * (512 * 512 + 3 * 512)
            tracker.reset_peak()
            out.sum().backward()
            assert tracker.peak >= 4 * (512 * 512 + 2 * 3 * 512)
        assert x.grad is not None
        assert (x.grad.shape, fake[1](x).shape) == ((3, 512), (3, 1024))
        assert not any(weight.requires_grad for weight in (fake[0].weight, fake[1].weight))
