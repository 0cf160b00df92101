"""The attention tap: probabilities against float64, other layers and the state afterwards bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import PROMPT, each, opened, output, same, weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from faults import Clock, by_calls, every_step
from peft import LoraConfig
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.core.errors import ImagicError
from imagic_lora.sampling.attention import (
    AttentionEdit,
    Layer,
    attention_layers,
    coarsest_cross_layers,
    map_size,
    tapped,
    word_maps,
)

BASES = ("epsilon", "v_prediction", "sdxl", "critters")


class Recorder(AttentionEdit):
    """Records the probabilities of chosen layers, or of all, and replaces them by what a function returns."""

    def __init__(self, chosen: Any = lambda layer, queries: True, change: Any = lambda probabilities: probabilities) -> None:
        self.chosen, self.change, self.seen = chosen, change, {}

    def applies(self, layer: Layer, queries: int) -> bool:
        return self.chosen(layer, queries)

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        self.seen[layer] = probabilities
        return self.change(probabilities)


@torch.no_grad()
def predicted(base: Base) -> Tensor:
    """The prediction for two samples at fixed latents."""
    side, channels = base.resolution // base.architecture.vae_scale_factor, base.architecture.vae["latent_channels"]
    latents = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(5))
    prompt = base.with_added_conditions(base.encode_prompt(PROMPT), base.resolution, base.resolution, 3.0)
    return base.predict(latents, torch.tensor([10, 700]), prompt)


@contextmanager
def projections(base: Base) -> Iterator[dict[str, Tensor]]:
    """The outputs of the query and key projections, by the name of their layer."""
    found: dict[str, Tensor] = {}
    hooks = [
        getattr(module, part).register_forward_hook(
            lambda module, inputs, output, name=f"{layer.name}.{part}": found.__setitem__(name, output.double())
        )
        for layer, module in attention_layers(base)
        for part in ("to_q", "to_k")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def processors(base: Base) -> dict[str, Any]:
    """The processor of every attention layer by name."""
    return base.denoiser.attn_processors  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def same_objects(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(first[name] is second[name] for name in first)


@pytest.mark.parametrize("name", BASES)
def test_probabilities_are_an_explicit_softmax_in_float64(named: Any, name: str) -> None:
    """Of every layer; the prediction with them is that of SDPA up to rounding."""
    base, recorder = named(name), Recorder()
    untapped = predicted(base)
    with tapped(base, recorder), projections(base) as found:
        explicit = predicted(base)
    torch.testing.assert_close(explicit, untapped, rtol=1e-4, atol=1e-5)
    layers = attention_layers(base)
    assert set(recorder.seen) == {layer for layer, _ in layers}
    for layer, module in layers:
        query, key = (found[f"{layer.name}.{part}"].unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
        expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(recorder.seen[layer].double(), expected, rtol=1e-5, atol=1e-6)
        assert key.shape[2] == (base.encode_prompt(PROMPT).tokens.shape[1] if layer.cross else query.shape[2])


@pytest.mark.parametrize("name", BASES)
def test_layers_say_where_they_are(named: Any, name: str) -> None:
    """The names are those of the processors in diffusers; the number of queries is that of the positions at their level."""
    base, recorder = named(name), Recorder()
    with tapped(base, recorder):
        predicted(base)
    side = base.resolution // base.architecture.vae_scale_factor
    for layer, probabilities in recorder.seen.items():
        height, width = map_size(torch.zeros(1, 1, side, side), layer.level)
        assert probabilities.shape[2] == height * width
        assert layer.name.startswith(layer.place)
    assert {f"{layer.name}.processor" for layer in recorder.seen} == set(processors(base))
    deepest = coarsest_cross_layers(base)
    sizes = {layer: probabilities.shape[2] for layer, probabilities in recorder.seen.items() if layer.cross and layer.place != "mid"}
    assert set(deepest) == {layer for layer in sizes if sizes[layer] == min(sizes.values())}


def test_sizes_of_maps_are_rounded_up() -> None:
    """As a convolution with stride 2 does."""
    assert [map_size(torch.zeros(1, 4, 9, 14), level) for level in range(4)] == [(9, 14), (5, 7), (3, 4), (2, 2)]


def test_layers_of_real_stable_diffusion() -> None:
    """Words are localised in five layers at a quarter of the latents' size in SD 1.5, 2 in the down and 3 in the up half."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=768)

    fake: Any = SimpleNamespace(denoiser=unet, name="sd15", architecture=SimpleNamespace(denoiser=unet.config))
    assert len(attention_layers(fake)) == 32
    assert [(layer.place, layer.level) for layer in coarsest_cross_layers(fake)] == [("down", 2)] * 2 + [("up", 2)] * 3


@pytest.mark.parametrize("name", BASES)
def test_the_processors_are_the_same_objects_afterwards(named: Any, name: str) -> None:
    """Also after an exception inside a pass and one in the body; the prediction is bit-equal to before."""
    base = named(name)
    before, state, prediction = processors(base), weights(base.denoiser), predicted(base)
    order = {layer.name: list(vars(module)) for layer, module in attention_layers(base)}

    def fail(probabilities: Tensor) -> Tensor:
        raise KeyError("inside")

    with tapped(base, Recorder(change=lambda probabilities: probabilities.roll(1, -1))):
        assert not torch.equal(predicted(base), prediction)
    with pytest.raises(KeyError), tapped(base, Recorder(change=fail)):
        predicted(base)
    with pytest.raises(KeyboardInterrupt), tapped(base, Recorder()):
        raise KeyboardInterrupt
    assert same_objects(before, processors(base))
    assert same(state, weights(base.denoiser))
    assert torch.equal(predicted(base), prediction)
    assert {layer.name: list(vars(module)) for layer, module in attention_layers(base)} == order


def test_only_layers_that_the_edit_wants_leave_sdpa(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others call their own processor; if the edit wants none, the prediction is bit-equal."""
    base = named("epsilon")
    prediction, calls, original = predicted(base), [], AttnProcessor2_0.__call__

    def counted(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(attn)
        return original(self, attn, *args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", counted)
    with tapped(base, Recorder(lambda layer, queries: False)):
        assert torch.equal(predicted(base), prediction)
    everything = [module for _, module in attention_layers(base)]
    assert len(calls) == len(everything)
    calls.clear()
    few = Recorder(lambda layer, queries: layer.cross and queries == 16)
    with tapped(base, few):
        predicted(base)
    assert {id(module) for module in calls} == {id(module) for layer, module in attention_layers(base) if layer not in few.seen}
    assert 0 < len(few.seen) < len(everything)


def test_what_the_edit_returns_is_what_the_values_are_multiplied_with(named: Any) -> None:
    """Probabilities of the first sample for both: the layer gives each sample its own values in the proportions of the first."""
    base = named("epsilon")
    layer, module = attention_layers(base)[1]
    assert layer.cross
    states, tokens = torch.randn(2, 64, module.query_dim), torch.randn(2, 7, module.cross_attention_dim)
    with torch.no_grad(), tapped(base, Recorder(change=lambda probabilities: probabilities[:1].expand_as(probabilities))):
        made = module(states, tokens)
    query, key, value = (
        f(x).double().unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for f, x in ((module.to_q, states), (module.to_k, tokens), (module.to_v, tokens))
    )
    probabilities = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)[:1]
    expected = module.to_out[0]((probabilities @ value).transpose(1, 2).flatten(2).float())
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)


def test_masks_of_tokens_are_respected(named: Any) -> None:
    """As SDPA does; no family of ours passes one."""
    base = named("epsilon")
    layer, module = attention_layers(base)[1]
    states, tokens = torch.randn(2, 64, module.query_dim), torch.randn(2, 8, module.cross_attention_dim)
    mask = torch.zeros(2, 1, 8)
    mask[:, :, 5:] = -10000.0
    recorder = Recorder()
    with torch.no_grad():
        expected = module(states, tokens, attention_mask=mask)
        with tapped(base, recorder):
            made = module(states, tokens, attention_mask=mask)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)
    assert recorder.seen[layer][..., 5:].max() < 1e-6


def test_lora_layers_are_tapped_too(folder: Path) -> None:
    """The projections with their LoRA part: the prediction through the tap is that of the tuned denoiser, which stays bit-equal."""
    base = opened(folder)
    untuned = output(base)
    unet: Any = base.denoiser
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    tuned, before = output(base), processors(base)
    recorder = Recorder()
    with tapped(base, recorder):
        torch.testing.assert_close(output(base), tuned, rtol=1e-4, atol=1e-5)
    assert len(recorder.seen) == len(attention_layers(base)) == len(before)
    assert (tuned - untuned).abs().max() > 1e-3
    assert torch.equal(output(base), tuned)
    assert same_objects(before, processors(base))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_an_interruption_at_any_step_is_harmless(folder: Path, lasting: bool) -> None:
    """While processors are replaced or restored: those that are left act as the original ones, and the next tap removes them."""
    base = opened(folder)
    before, prediction = processors(base), output(base)

    def change(clock: Clock) -> None:
        def work() -> None:
            with tapped(base, Recorder(change=lambda probabilities: probabilities.roll(1, -1))):
                pass

        by_calls(clock, work, [(Attention, "set_processor")])

    left = []
    for _ in every_step(change, lasting=lasting, most=8):
        left.append(not same_objects(before, processors(base)))
        assert torch.equal(output(base), prediction)
        with tapped(base, Recorder()):
            pass
        assert same_objects(before, processors(base))
    assert any(left)


@each("precision", [torch.float16, torch.bfloat16])
def test_probabilities_are_fp32_in_every_precision(folder: Path, precision: torch.dtype) -> None:
    """Scores beyond the range of fp16 do not overflow."""
    base = opened(folder)
    layer, module = attention_layers(base)[1]
    module.to(precision)
    states, tokens = (torch.randn(1, n, width).to(precision) for n, width in ((64, module.query_dim), (5, module.cross_attention_dim)))
    recorder = Recorder()
    with torch.no_grad(), tapped(base, recorder):
        assert module(states * 1000, tokens * 1000).dtype == precision
    assert recorder.seen[layer].dtype == torch.float32
    assert recorder.seen[layer].isfinite().all()


def test_words_are_summed_and_heads_averaged() -> None:
    """Each sample with its own tokens."""
    probabilities = torch.rand(2, 3, 4, 5)
    maps = word_maps(probabilities, torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]))
    torch.testing.assert_close(maps[0], (probabilities[0, :, :, 1] + probabilities[0, :, :, 2]).mean(0))
    torch.testing.assert_close(maps[1], probabilities[1, :, :, 4].mean(0))


def test_a_denoiser_without_attention_is_an_error() -> None:
    """It is named."""
    architecture = SimpleNamespace(denoiser={"block_out_channels": (1,)})
    fake: Any = SimpleNamespace(denoiser=torch.nn.Linear(1, 1), name="flat", architecture=architecture)
    with pytest.raises(ImagicError, match="base flat, whose denoiser has no attention layers"), tapped(fake, Recorder()):
        pass
