"""LEDITS++ in the DDIM form: masks and guidance against diffusers' own parts, and the exact photo without guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import each, opened, same, weights
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import (
    LeditsAttentionStore,
    LEDITSCrossAttnProcessor,
    LeditsGaussianSmoothing,
)
from torch import Tensor

from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.attention.ledits import Concept, ConceptGuidance, LEdits, LEditsConfig, word_tokens
from imagic_lora.methods.inversions.edit_friendly import EditFriendly, EditFriendlyConfig
from imagic_lora.methods.inversions.inverted import Inverted
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import EncodedRequest, encode_request
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.attention import tapped
from imagic_lora.sampling.trajectory import Step, predictions

PHRASES = ("a hat", "red")
LEVELS = {"epsilon": 0, "critters": 1, "sdxl": 1}
"""How often the latents are halved before the maps that words are localised with."""


@pytest.fixture(scope="module")
def request_(photo_file: Path) -> EditRequest:
    return EditRequest(read_photo(photo_file).image, "a red dog", seed=3)


def inverted(wanted: EncodedRequest) -> Inverted:
    """The photo, inverted with the empty prompt in 5 steps, of which 1 is skipped."""
    return EditFriendly().invert(wanted, EditFriendlyConfig(steps=5, skip=1, source_guidance_scale=1.0))


def concepts(wanted: EncodedRequest, *signs: float) -> list[Concept]:
    return [Concept(wanted.encode_prompt(text), word_tokens(wanted.base, text), sign) for text, sign in zip(PHRASES, signs, strict=False)]


def by_diffusers(wanted: EncodedRequest, latents: Tensor, timestep: int, signs: tuple[float, float], config: LEditsConfig) -> Tensor:
    """The guided prediction as diffusers' pipeline makes it: its attention processors, its store, its smoothing, its quantiles."""
    base, unet = wanted.base, wanted.base.denoiser
    side = tuple((size + LEVELS[Path(base.name).name]) // 2 ** LEVELS[Path(base.name).name] for size in latents.shape[2:])
    store: Any = LeditsAttentionStore(average=False, batch_size=1, max_size=64 * 64, max_resolution=None)  # pyright: ignore[reportArgumentType]
    kept: Any = dict(unet.attn_processors)  # pyright: ignore[reportArgumentType, reportCallIssue]
    places = {name: name.split("_")[0] for name in kept}
    theirs = {name: LEDITSCrossAttnProcessor(store, places[name], False, 2) for name in kept if "attn2" in name and places[name] != "mid"}
    unet.set_attn_processor({name: theirs.get(name, AttnProcessor()) for name in kept})  # pyright: ignore[reportCallIssue]
    prompts = [concept.conditioning for concept in concepts(wanted, *signs)]
    assert wanted.null is not None
    null, *edits = predictions(base, latents, timestep, wanted.null, *prompts)
    unet.set_attn_processor(kept)  # pyright: ignore[reportCallIssue]
    guidance = torch.zeros_like(null)
    for index, (text, sign, edit) in enumerate(zip(PHRASES, signs, edits, strict=True)):
        term = (edit - null) * sign * config.guidance_scale
        out = store.aggregate_attention(store.step_store, PHRASES, side, ["up", "down"], True, index)
        words = out[:, :, :, 1 : len(base.tokenize(text)) - 1].sum(3)
        words = LeditsGaussianSmoothing("cpu")(torch.nn.functional.pad(words[:, None], (1, 1, 1, 1), mode="reflect"))[:, 0]
        mask = (words >= words.flatten(1).quantile(config.threshold, dim=1)[:, None, None]).float()
        mask = torch.nn.functional.interpolate(mask[:, None], latents.shape[2:])
        if timestep <= 800:
            size = term.abs().sum(1, keepdim=True)
            mask = mask * (size >= size.flatten(1).quantile(config.threshold, dim=1)[:, None, None, None])
        guidance += term * mask
    return null + guidance


@each("name", ["epsilon", "critters", "sdxl"])
@torch.no_grad()
def test_guidance_and_masks_are_those_of_diffusers(named: Any, request_: EditRequest, name: str) -> None:
    """For two concepts, one of them removed, at noise levels with one kind of mask and with both."""
    base = named(name)
    wanted, config = encode_request(base, request_, 3.0), LEditsConfig(guidance_scale=7.0, threshold=0.6)
    assert wanted.null is not None
    guidance = ConceptGuidance(inverted(wanted), concepts(wanted, 1.0, -1.0), config)
    for timestep in (901, 301):
        latents = wanted.noise()
        step = Step(0, timestep, 0, 1, latents, latents)
        guidance.inverted = replace(guidance.inverted, nulls=[wanted.null])
        with tapped(base, guidance):
            made = guidance.prediction(latents, step)
        expected = by_diffusers(wanted, latents, timestep, (1.0, -1.0), config)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        (null,) = predictions(base, latents, timestep, wanted.null)
        untouched = ((made - null).abs() < 1e-4).all(1).float().mean()
        assert 0.1 < untouched < 1
    assert 0 < guidance.masks().mean() < 1


@each("name", ["epsilon", "v_prediction", "critters"])
def test_a_concept_that_says_nothing_gives_the_photo(named: Any, request_: EditRequest, name: str) -> None:
    """The recorded noise leads back to the latents of the photo; a concept of its own leads elsewhere."""
    base = named(name)
    wanted = encode_request(base, request_, 3.0)
    assert wanted.null is not None
    empty = Concept(wanted.null, word_tokens(base, "a"), 1.0)
    torch.testing.assert_close(ConceptGuidance(inverted(wanted), [empty], LEditsConfig()).edited(), wanted.clean, rtol=1e-3, atol=1e-3)
    made = ConceptGuidance(inverted(wanted), concepts(wanted, 1.0), LEditsConfig(threshold=0.5)).edited()
    assert (made - wanted.clean).abs().max() > 1e-2


def test_words_are_the_tokens_between_start_and_end(named: Any) -> None:
    """Nothing of the padding."""
    base = named("epsilon")
    assert word_tokens(base, "a hat").tolist() == [0, 1, 1, 1, 1] + [0] * 11


def test_concepts_are_the_target_prompt_unless_they_are_named() -> None:
    """Those to add come before those to remove."""
    assert LEditsConfig().concepts("a dog") == [("a dog", 1.0)]
    assert LEditsConfig(add=("a hat", "snow"), remove=("rain",)).concepts("a dog") == [("a hat", 1.0), ("snow", 1.0), ("rain", -1.0)]


METHOD = LEdits(
    {
        "one": LEditsConfig(steps=4, skip=0.5),
        "two": LEditsConfig(steps=4, skip=0.0, add=("a hat",), remove=("red",), guidance_scale=1.0),
    }
)


def test_passes_are_predicted_and_the_base_is_as_before(folder: Path, request_: EditRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as were measured; the same processor objects, after an exception in the middle too. A source prompt has no effect."""
    base = opened(folder)
    before, processors = weights(base.denoiser), dict(base.denoiser.attn_processors)  # pyright: ignore[reportArgumentType, reportCallIssue]
    images = []
    for request in (request_, replace(request_, source_prompt="a cat")):
        for result in METHOD.edit(Context(base), request):
            assert METHOD.passes(base)[result.row] == (result.cost.forward, 0, False)
            assert result.image.size == result.extras["mask"].size == request_.photo.size
            images.append(result.image.tobytes())
    assert images[:2] == images[2:]
    assert images[0] != images[1]

    def fail(self: Any, probabilities: Tensor, layer: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConceptGuidance, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        list(METHOD.edit(Context(base), request_))
    assert same(before, weights(base.denoiser))
    after = dict(base.denoiser.attn_processors)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert list(after) == list(processors)
    assert all(after[name] is processors[name] for name in after)


def test_a_concept_without_words_is_an_error(folder: Path, request_: EditRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    base = opened(folder)
    for work in ("predict", "encode_image", "encode_prompt"):
        monkeypatch.setattr(base, work, None)
    with pytest.raises(ImagicError, match="an empty prompt"):
        next(LEdits({"row": LEditsConfig(add=(" ",))}).edit(Context(base), request_))
