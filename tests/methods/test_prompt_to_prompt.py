"""Prompt-to-Prompt and direct inversion: attention against plain loops, equal texts, and what is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, each, opened, same, slow_but, weights
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.tokens import Token
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.attention.blend import LocalBlend
from imagic_lora.methods.attention.branches import two_branches
from imagic_lora.methods.attention.control import AttentionControl, ControlConfig, control
from imagic_lora.methods.attention.prompt_to_prompt import (
    _INVERSIONS,
    AttentionMethod,
    DirectInversion,
    DirectInversionConfig,
    GeneratedConfig,
    PromptToPrompt,
    PromptToPromptConfig,
    PromptToPromptText,
)
from imagic_lora.methods.attention.words import Prompt, aligned
from imagic_lora.methods.inversions.ddim import DDIMInversion
from imagic_lora.methods.inversions.inverted import Inverted
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import EncodedRequest, SamplingConfig, encode_request
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.attention import Layer, attention_layers, coarsest_cross_layers
from imagic_lora.sampling.trajectory import Trajectory, last

BASES = ("epsilon", "v_prediction", "sdxl", "critters")
CROSS, SELF = Layer("down_blocks.0.attn2", True, "down", 0), Layer("down_blocks.0.attn1", False, "down", 0)
STEPS = {"steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def request_(photo_file: Path) -> EditRequest:
    return EditRequest(read_photo(photo_file).image, "a red dog", source_prompt="a cat", seed=3)


def encoded(base: Base, request: EditRequest) -> EncodedRequest:
    return encode_request(base, request, 3.0)


def noise(request: EncodedRequest, steps: int = 4) -> Inverted:
    """What is edited, if it is noise."""
    return PromptToPromptText().invert(request, GeneratedConfig(steps=steps))


# the change of attention, against loops over tokens


def tokens(text: str) -> Prompt:
    """A prompt of one token a letter."""
    return Prompt(text, [Token(0, 0, 0), *(Token(ord(c), k, k + 1) for k, c in enumerate(text) if c != " "), Token(1, 0, 0)])


def test_cross_attention_is_that_of_the_source_for_shared_tokens() -> None:
    """Times the factor of each token, up to the last step of each; all other samples are untouched."""
    alignment = aligned("refine", tokens("a b c"), tokens("a x c"), 8)
    factors = torch.tensor([1.0, 1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    until = torch.tensor([3, 3, 1, 3, 3, 3, 3, 3])
    change = AttentionControl(alignment, factors, until, 0, 0, None)
    given = torch.rand(4, 2, 5, 8).softmax(-1)
    origins = {0: 0, 1: 1, 2: None, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7}
    for change.step in range(4):
        made = change(given, CROSS)
        expected = given.clone()
        for token, origin in origins.items():
            if change.step < until[token]:
                expected[3, :, :, token] = factors[token] * (given[3, :, :, token] if origin is None else given[2, :, :, origin])
        torch.testing.assert_close(made, expected)
        assert torch.equal(made[:3], given[:3])
        assert change.applies(CROSS, 5) == (change.step < 3)


def test_self_attention_is_that_of_the_source_where_it_is_small() -> None:
    """Up to a step, and a number of queries."""
    change = AttentionControl(aligned("refine", tokens("a"), tokens("b"), 4), torch.ones(4), torch.zeros(4), 2, 16, None)
    given = torch.rand(3, 2, 16, 16)
    assert torch.equal(change(given, SELF), given[[0, 1, 1]])
    for change.step, applies in enumerate((True, True, False)):
        assert (change.applies(SELF, 16), change.applies(SELF, 17), change.applies(CROSS, 4)) == (applies, False, False)


def test_windows_of_the_steps_are_those_of_the_official_code(named: Any, request_: EditRequest) -> None:
    """int(share (N + 1)) steps of cross-attention, int(share N) of self-attention; factors and steps of single words."""
    base = named("critters")
    prompts = replace(request_, source_prompt="a cat sitting", target_prompt="a dog sitting on grass")
    settings: dict[str, Any] = {"source_blend": ("cat",), "target_blend": ("dog",), "blend_factor": 2.0}
    config = ControlConfig(cross_steps=0.8, self_steps=0.4, self_size=16, factors={"grass": 5}, word_steps={"dog": 0.2}, **settings)
    change = control(base, prompts, config, 50)
    dog, grass = (Prompt(prompts.target_prompt, base.tokenize(prompts.target_prompt)).positions(word) for word in ("dog", "grass"))
    assert {int(change.cross_steps[k]) for k in dog} == {10}
    assert {int(until) for k, until in enumerate(change.cross_steps) if k not in dog} == {40}
    assert (change.self_steps, change.self_queries) == (20, 256)
    few = control(base, prompts, ControlConfig(cross_steps=0.5, self_steps=0.5), 5)
    assert (set(few.cross_steps.tolist()), few.self_steps) == ({3}, 2)
    assert {float(change.factors[k]) for k in dog} == {2.0}
    assert {float(change.factors[k]) for k in grass} == {5.0}
    assert change.factors.sum() == len(change.factors) + len(dog) + 4 * len(grass)
    assert change.blend is not None
    assert change.blend.start == 10
    assert torch.equal(change.blend.words.sum(1), torch.tensor([1.0 * len(dog), 1.0 * len(dog)]))


# local blend


def test_local_blend_is_that_of_the_official_code(named: Any) -> None:
    """Against loops: sums over layers, steps and tokens, the mean over heads, the largest of 3 x 3, a share of the largest, either of
    both; nothing before its start."""
    base = named("critters")
    layers = coarsest_cross_layers(base)
    words = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1]])
    blend, draw = LocalBlend(base, words, 0.9, 1), torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 8, 8)
    total = np.zeros((2, 4, 4))
    for _ in range(2):
        for layer in layers:
            given = torch.rand(2, 3, 16, 4, generator=draw) ** 4
            blend.record(given, layer)
            total += np.stack([given[k].numpy()[:, :, words[k].numpy() > 0].sum(-1).mean(0).reshape(4, 4) for k in range(2)])
        blend.record(torch.rand(2, 3, 64, 4), next(layer for layer, _ in attention_layers(base) if layer.level == 0))
    padded = np.pad(total, ((0, 0), (1, 1), (1, 1)))
    pooled = np.stack([padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]).max(0)
    inside = (pooled > 0.9 * pooled.max((1, 2), keepdims=True)).any(0).repeat(2, 0).repeat(2, 1)
    assert 0 < inside.sum() < 64
    assert np.array_equal(blend.mask(latents)[0, 0].numpy() > 0, inside)
    made = blend.blended(latents, 2)
    assert torch.equal(made[0], latents[0])
    assert torch.equal(made[1], torch.where(torch.tensor(inside), latents[1], latents[0]))
    assert torch.equal(blend.blended(latents, 1), latents)


@each("name", ["critters", "epsilon"])
def test_local_blend_keeps_the_source_outside_its_mask(named: Any, request_: EditRequest, name: str) -> None:
    """The latents of the target after the last step."""
    base = named(name)
    wanted = encoded(base, request_)
    change = control(base, request_, ControlConfig(source_blend=("cat",), target_blend=("red dog",), blend_threshold=0.97), 4)
    latents = two_branches(noise(wanted), wanted.target, 3.0, change)
    assert change.blend is not None
    outside = change.blend.mask(latents)[0, 0] == 0
    assert 0 < outside.sum() < outside.numel()
    assert torch.equal(latents[1][:, outside], latents[0][:, outside])
    assert not torch.equal(latents[1][:, ~outside], latents[0][:, ~outside])


# the methods


@pytest.mark.parametrize("name", slow_but(["epsilon", "sdxl"], BASES))
@pytest.mark.parametrize("rule", ["refine", "replace"])
def test_equal_texts_give_the_source(named: Any, request_: EditRequest, name: str, rule: Any) -> None:
    """Whatever the windows; the source is that of plain sampling."""
    base = named(name)
    wanted = encoded(base, replace(request_, target_prompt="a cat"))
    plain = last(torch.empty(0), noise(wanted).sample(noise(wanted).sources, 3.0))
    for cross, own in ((0.5, 0.5), (1.0, 1.0)):
        change = control(base, wanted.request, ControlConfig(edit=rule, cross_steps=cross, self_steps=own), 4)
        source, target = two_branches(noise(wanted), wanted.target, 3.0, change).split(1)
        torch.testing.assert_close(target, source, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(source, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(["v_prediction", "sdxl"], BASES))
def test_without_a_change_of_attention_the_target_is_plain_sampling(named: Any, request_: EditRequest, name: str) -> None:
    """And with one it is not; at scale 1 too, where there are two samples a step."""
    base = named(name)
    wanted = encoded(base, request_)
    for scale in (1.0, 3.0):
        plain = noise(wanted).edited(wanted.target, scale)
        made = [
            two_branches(
                noise(wanted), wanted.target, scale, control(base, request_, ControlConfig(cross_steps=share, self_steps=share), 4)
            )
            for share in (0.0, 0.8)
        ]
        torch.testing.assert_close(made[0][1:], plain, rtol=1e-4, atol=1e-4)
        assert (made[1][1:] - plain).abs().max() > 1e-3
        torch.testing.assert_close(made[0][:1], made[1][:1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each("inversion", ["ddim-inversion", "negative-prompt", "null-text", "renoise", "edit-friendly"])
def test_every_inversion_can_be_edited(named: Any, request_: EditRequest, inversion: Any) -> None:
    """The source is the reconstruction by that inversion; without a change of attention the target is its edit."""
    base = named("epsilon")
    wanted = encoded(base, request_)
    more = {"null-text": {"inner_steps": 2}, "edit-friendly": {"skip": 1}}.get(inversion, {})
    config = PromptToPromptConfig(inversion=inversion, inversion_settings=more, cross_steps=0, self_steps=0, **STEPS)
    inverted = _INVERSIONS[inversion]().invert(wanted, config.inversion_config())
    latents = two_branches(inverted, wanted.target, 3.0, control(base, request_, config, 4))
    torch.testing.assert_close(latents[:1], inverted.reconstructed(3.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents[1:], inverted.edited(wanted.target, 3.0), rtol=1e-3, atol=1e-3)
    (result,) = PromptToPrompt({"row": config}).edit(Context(base), request_)
    assert result.row == "row"
    made = array(wanted.image(latents[1:]))
    assert np.abs(array(result.image) - made).max() <= 2


@pytest.mark.parametrize("name", slow_but(["v_prediction", "sdxl"], BASES))
def test_direct_inversion_keeps_the_source_on_the_path(
    named: Any, request_: EditRequest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit after every step; the target without a change of attention is that of DDIM inversion, at any scale."""
    base = named(name)
    wanted = encoded(base, request_)
    inverted = DirectInversion().invert(wanted, DirectInversionConfig(**STEPS))
    seen: list[Tensor] = []
    forwards = Trajectory.forwards

    def watched(*args: Any, **kwargs: Any) -> Any:
        for step in forwards(*args, **kwargs):
            yield step
            seen.append(step.latents)

    for scale in (1.0, 3.0):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Trajectory, "forwards", watched)
            still = control(base, request_, ControlConfig(cross_steps=0, self_steps=0), 4)
            latents = two_branches(inverted, wanted.target, scale, still, on_path=True)
        assert [torch.equal(latents[:1], inverted.path[k + 1]) for k, latents in enumerate(seen)] == [True] * 4
        assert torch.equal(latents[:1], wanted.clean)
        by_ddim = DDIMInversion().invert(wanted, SamplingConfig(**STEPS)).edited(wanted.target, scale)
        torch.testing.assert_close(latents[1:], by_ddim, rtol=1e-4, atol=1e-4)


def test_direct_inversion_attends_as_the_photo(named: Any, request_: EditRequest) -> None:
    """A target that attends as the source in every step, with the source prompt, without guidance: the photo, but for what the latents
    off the path change."""
    base = named("epsilon")
    wanted = encoded(base, replace(request_, target_prompt="a cat"))
    inverted = DirectInversion().invert(wanted, DirectInversionConfig(**STEPS))
    errors = []
    for share in (0.0, 1.0):
        change = control(base, wanted.request, ControlConfig(cross_steps=share, self_steps=share), 4)
        errors.append(float((two_branches(inverted, wanted.target, 1.0, change, on_path=True)[1:] - wanted.clean).abs().mean()))
    assert errors[1] < errors[0]


METHODS: list[AttentionMethod[Any]] = [
    PromptToPrompt({"a": PromptToPromptConfig(inversion="ddim-inversion", **STEPS)}),
    PromptToPrompt({"b": PromptToPromptConfig(inversion="negative-prompt", steps=4, guidance_scale=1.0)}),
    PromptToPrompt({"e": PromptToPromptConfig(inversion="edit-friendly", inversion_settings={"skip": 1}, **STEPS)}),
    DirectInversion({"c": DirectInversionConfig(source_blend=("cat",), target_blend=("dog",), **STEPS)}),
    PromptToPromptText({"d": GeneratedConfig(**STEPS)}),
]


@each("method", METHODS)
def test_passes_are_predicted(named: Any, request_: EditRequest, method: AttentionMethod[Any]) -> None:
    """As many as were measured; pictures have the size of the photo."""
    base = named("epsilon")
    (result,) = method.edit(Context(base), request_)
    predicted = method.passes(base)[result.row]
    assert (predicted.forward, predicted.backward) == (result.cost.forward, result.cost.backward)
    assert result.image.size == request_.photo.size
    pictures = {name: extra.size for name, extra in result.extras.items() if isinstance(extra, Image.Image)}
    assert pictures == {"c": {"blend": (50, 37)}, "d": {"source": (50, 37)}}.get(result.row, {})


def test_null_text_is_predicted_as_a_limit(named: Any, request_: EditRequest) -> None:
    """Its inner loop may stop earlier."""
    base, config = named("epsilon"), PromptToPromptConfig(inversion_settings={"inner_steps": 2, "stop_below": 0}, **STEPS)
    method = PromptToPrompt({"row": config})
    (result,) = method.edit(Context(base), request_)
    predicted = method.passes(base)["row"]
    assert predicted.at_most
    assert (predicted.forward, predicted.backward) == (result.cost.forward, result.cost.backward)


def state(base: Base) -> tuple[Any, ...]:
    """Everything of a base that a method could leave changed."""
    internals: Any = base
    return (
        weights(base.denoiser),
        dict(base.denoiser.attn_processors),  # pyright: ignore[reportArgumentType, reportCallIssue]
        [list(vars(module)) for _, module in attention_layers(base)],
        dict(internals._scheduler.config),
        {name: tokenizer.get_vocab() for name, tokenizer in internals._tokenizers.items()},
        base.denoiser.training,
        len(base.denoiser._forward_hooks),
    )


def unchanged(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    processors = first[1].keys() == second[1].keys() and all(first[1][name] is second[1][name] for name in first[1])
    return same(first[0], second[0]) and processors and first[2:] == second[2:]


@each("method", METHODS)
def test_the_base_is_as_before(folder: Path, request_: EditRequest, method: AttentionMethod[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, processors, scheduler, tokenizer: after an edit, and after an exception inside the change of attention."""
    base = opened(folder)
    before = state(base)
    list(method.edit(Context(base), request_))
    assert unchanged(before, state(base))

    def fail(self: Any, probabilities: Tensor, layer: Layer) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(AttentionControl, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        list(method.edit(Context(base), request_))
    assert unchanged(before, state(base))


# bad input


@each(
    "changes, settings, message",
    [
        ({"source_prompt": None}, {}, "without a source prompt"),
        ({"target_prompt": "a dog on grass"}, {"edit": "replace"}, "2 words in 'a cat' and 4 in 'a dog on grass'"),
        ({}, {"factors": {"horse": 2}}, "the word 'horse', which is not in the prompt 'a red dog'"),
        ({}, {"word_steps": {"cat": 0.2}}, "the word 'cat', which is not in the prompt 'a red dog'"),
        ({}, {"source_blend": ("dog",), "target_blend": ("dog",)}, "the word 'dog', which is not in the prompt 'a cat'"),
        ({}, {"source_blend": ("cat",), "target_blend": ("cat",)}, "the word 'cat', which is not in the prompt 'a red dog'"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_computed(
    folder: Path, request_: EditRequest, monkeypatch: pytest.MonkeyPatch, changes: Any, settings: Any, message: str
) -> None:
    """By every method."""
    base = opened(folder)
    for work in ("predict", "encode_image", "encode_prompt"):
        monkeypatch.setattr(base, work, None)
    methods: Any = {PromptToPrompt: PromptToPromptConfig, DirectInversion: DirectInversionConfig, PromptToPromptText: GeneratedConfig}
    for method, config in methods.items():
        with pytest.raises(ImagicError, match=message):
            next(method({"row": config(**settings)}).edit(Context(base), replace(request_, **changes)))


@each(
    "settings, message",
    [
        ({"source_blend": ("cat",)}, "source_blend and target_blend, or neither"),
        ({"word_steps": {"cat": 1.5}}, "word_steps between 0 and 1 for 'cat'"),
        ({"factors": {"cat": 1e9}}, "factors between -100 and 100 for 'cat'"),
        ({"inversion": "guessing"}, "inversion"),
        ({"inversion_settings": {"steps": 3}}, "without steps and guidance_scale"),
        ({"inversion_settings": {"inner_stepz": 3}}, "inner_stepz"),
        ({"inversion": "renoise", "inversion_settings": {"iterations": -3}}, "iterations"),
    ],
)
def test_bad_settings_are_errors(settings: Any, message: str) -> None:
    """At once."""
    with pytest.raises(ValidationError, match=message):
        PromptToPromptConfig(**settings)


def test_defaults_are_those_of_the_official_code() -> None:
    """Of the notebook for null-text inversion, of the run on PIE-Bench, and of the first notebook; as JSON."""
    rows = [method().settings for method in (PromptToPrompt, DirectInversion, PromptToPromptText)]
    shares = [[next(iter(row.values()))[name] for name in ("steps", "guidance_scale", "cross_steps", "self_steps")] for row in rows]
    assert shares == [[50, 7.5, 0.8, 0.5], [50, 7.5, 0.4, 0.6], [50, 7.5, 0.8, 0.4]]
    assert json.loads(json.dumps(rows))[0]["prompt-to-prompt"]["inversion"] == "null-text"
    assert [list(row) for row in rows] == [["prompt-to-prompt"], ["direct-inversion"], ["prompt-to-prompt-text"]]
