"""Methods that only sample: what each gives in cases with a known answer, its passes, and a base that stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, each, opened, same, slow_but, weights
from diffusers import DDIMScheduler
from PIL import Image
from pydantic import ValidationError
from tiny import save_tiny, save_tiny_sdxl
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.conditioning import concatenate
from imagic_lora.core.config import EditConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.methods.generated import PromptOnly
from imagic_lora.methods.inversions.ddim import DDIB, DDIBConfig, DDIMInversion
from imagic_lora.methods.inversions.edit_friendly import EditFriendly, EditFriendlyConfig
from imagic_lora.methods.inversions.inverted import InvertingMethod
from imagic_lora.methods.inversions.negative_prompt import (
    NegativePromptInversion,
    ProximalConfig,
    ProximalInversion,
    dilated,
    quantiles,
    thresholded,
)
from imagic_lora.methods.inversions.null_text import NullTextConfig, NullTextInversion
from imagic_lora.methods.inversions.renoise import ReNoise, ReNoiseConfig
from imagic_lora.methods.magicmix import MagicMix, MagicMixConfig, MagicMixText
from imagic_lora.methods.method import Context, EditRequest, EditResult, Method, Passes
from imagic_lora.methods.sampled import EncodedRequest, SamplingConfig, SamplingMethod, encode_request
from imagic_lora.methods.sdedit import SDEdit, SDEditConfig
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.generate import generate
from imagic_lora.sampling.trajectory import last

GUIDED = {"steps": 4, "guidance_scale": 3.0}
CAPTIONS = ("a hen", "a fox")
ABLATIONS: list[Any] = ["vqae", "random-pivot", "global", "random-caption", "textual-inversion", "pivotal-textual-inversion", "no-pivot"]


def null_text(**more: Any) -> NullTextConfig:
    return NullTextConfig(**(GUIDED | {"inner_steps": 3, "stop_below": 0.0, "other_captions": CAPTIONS} | more))


METHODS: dict[str, SamplingMethod[Any]] = {
    "prompt-only": PromptOnly({"one": SamplingConfig(**GUIDED)}),
    "sdedit": SDEdit({"one": SDEditConfig(strength=0.5, **GUIDED)}),
    "ddim-inversion": DDIMInversion({"one": SamplingConfig(**GUIDED), "unguided": SamplingConfig(steps=3, guidance_scale=1.0)}),
    "ddib": DDIB({"one": DDIBConfig(**GUIDED)}),
    "negative-prompt": NegativePromptInversion({"one": SamplingConfig(**GUIDED)}),
    "proximal": ProximalInversion({"one": ProximalConfig(**GUIDED), "soft": ProximalConfig(threshold="soft", **GUIDED)}),
    "null-text": NullTextInversion({"one": null_text(), "stops": null_text(stop_below=1.0)}),
    "ablations": NullTextInversion({ablation: null_text(ablation=ablation) for ablation in ABLATIONS}),
    "edit-friendly": EditFriendly({f"skip{skip}": EditFriendlyConfig(skip=skip, **GUIDED) for skip in (0, 1, 4)}),
    "renoise": ReNoise({"one": ReNoiseConfig(**GUIDED), "more": ReNoiseConfig(iterations=3, average_from=1, **GUIDED)}),
    "magicmix": MagicMix({"one": MagicMixConfig(**GUIDED)}),
    "magicmix-text": MagicMixText({"one": MagicMixConfig(**GUIDED)}),
}


@pytest.fixture
def base(folder: Path) -> Base:
    return opened(folder)


@pytest.fixture(scope="module")
def wanted(photo_file: Path) -> EditRequest:
    """A photo of 50 x 37, both prompts."""
    return EditRequest(read_photo(photo_file).image, "a cat", "a dog", seed=11)


def run(method: Method, base: Base, wanted: EditRequest) -> list[EditResult]:
    return list(method.edit(Context(base), wanted))


def encoded(base: Base, wanted: EditRequest) -> EncodedRequest:
    return encode_request(base, wanted, 3.0)


def inverted(method: InvertingMethod[Any], base: Base, wanted: EditRequest, config: SamplingConfig) -> Any:
    with torch.no_grad():
        return method.invert(encoded(base, wanted), config)


def latents_of(method: SamplingMethod[Any], base: Base, wanted: EditRequest, config: SamplingConfig) -> Tensor:
    """The clean latents that a method decodes."""
    found: list[Tensor] = []

    class Kept(EncodedRequest):
        def image(self, latents: Tensor) -> Image.Image:
            found.append(latents)
            return super().image(latents)

    request = encoded(base, wanted)
    with torch.no_grad():
        method.sample(Kept(**vars(request)), config)
    return found[0]


class Gaussian:
    """The exact denoiser of photos whose latents are independent normal numbers, in place of the random network of a tiny base."""

    def __init__(self, base: Base, deviation: float = 0.5) -> None:
        self.base, self.variance = base, deviation**2

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        a = self.base.training_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        total = a * self.variance + 1 - a
        return self.base.target(a.sqrt() * self.variance * x_t / total, (1 - a).sqrt() * x_t / total, timesteps)


def psnr(found: Tensor, expected: Tensor) -> float:
    return float(-10 * (found - expected).square().mean().log10())


# what holds for all


def state(base: Base) -> dict[str, Any]:
    """What an edit may change, but for the weights."""
    modules = list(base.denoiser.modules())
    return {
        "processors": {name: id(one) for name, one in base.denoiser.attn_processors.items()},  # pyright: ignore[reportCallIssue]
        "hooks": [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in modules],
        "training": [one.training for one in modules],
        "trained": [(one.requires_grad, one.grad) for one in base.denoiser.parameters()],
        "scheduler": dict(base.scheduler().config),
        "timesteps": base.scheduler().timesteps.tolist(),
    }


@pytest.mark.parametrize("name", slow_but([name for name in METHODS if name not in ("ablations", "null-text", "renoise")], METHODS))
def test_every_method_says_its_passes_and_leaves_the_base_alone(base: Base, wanted: EditRequest, name: str) -> None:
    """The passes are those of the meter, or a bound of them; pictures have the photo's size; a second edit is the same bit for bit."""
    method, before, held = METHODS[name], weights(base.denoiser), state(base)
    made, again = run(method, base, wanted), run(method, base, wanted)
    assert tuple(one.row for one in made) == method.rows
    for one, other in zip(made, again, strict=True):
        predicted, (forward, backward) = method.passes(base)[one.row], (one.cost.forward, one.cost.backward)
        if predicted.at_most:
            assert forward <= predicted.forward
            assert backward <= predicted.backward
        else:
            assert (forward, backward) == predicted[:2]
        assert one.image.size == wanted.photo.size
        assert np.array_equal(array(one.image), array(other.image))
    assert same(weights(base.denoiser), before)
    assert state(base) == held
    assert json.loads(json.dumps(method.settings)) == method.settings


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_base_alone_after_an_exception(
    base: Base, wanted: EditRequest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the denoiser raises in its fifth call."""
    method, before, held = METHODS[name], weights(base.denoiser), state(base)
    unet, calls = base.denoiser.forward, iter(range(1000))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise KeyError("out of order")
        return unet(*args, **kwargs)

    def twice() -> None:  # one edit of few calls may end before the fifth
        run(method, base, wanted)
        run(method, base, wanted)
        run(method, base, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(base.denoiser, "forward", failing)
        with pytest.raises(KeyError):
            twice()
    assert torch.is_grad_enabled()
    assert same(weights(base.denoiser), before)
    assert state(base) == held


@pytest.mark.parametrize("kind", slow_but(["v_prediction"], ["sdxl", "v_prediction", "critters"]))
def test_every_method_runs_on_every_kind_of_base(kind: str, folders: dict[str, Path], wanted: EditRequest, tmp_path: Path) -> None:
    """SDXL with its pooled embedding, another prediction type, and eight latent channels; the target prompt has a say in each."""
    if kind == "critters":
        base = load_base("critters", resolve_runtime(MemoryConfig(device="cpu")))
    else:
        base = opened(save_tiny_sdxl(tmp_path / "sdxl") if kind == "sdxl" else folders[kind])
    for name, method in METHODS.items():
        row = method.rows[0]
        short = type(method)({row: method.configs[row].model_copy(update={"steps": 2, "inner_steps": 1})})
        one, other = (run(short, base, replace(wanted, target_prompt=prompt))[0] for prompt in ("a cat", "a hen on ice"))
        assert one.image.size == wanted.photo.size, name
        assert row == "vqae" or not np.array_equal(array(one.image), array(other.image)), name


# what a method needs


NEEDING = ["ddib", "negative-prompt", "proximal", "null-text", "renoise", "magicmix-text"]


@each("name", list(METHODS))
def test_a_missing_source_prompt_is_an_error_only_where_it_is_needed(folder: Path, wanted: EditRequest, name: str) -> None:
    """Before anything is computed."""
    base, without = opened(folder), replace(wanted, source_prompt=None)
    method = METHODS[name]
    if name not in [*NEEDING, "ablations"]:
        assert len(run(method, base, without)) == len(method.rows)
        return
    hook = base.denoiser.register_forward_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(ImagicError, match=f"method {method.name} without a source prompt") as caught:
        next(method.edit(Context(base), without))
    hook.remove()
    assert "describes the photo as it is" in caught.value.expected


@each(
    "change, got",
    [
        ({"target_prompt": "  "}, "an empty prompt"),
        ({"source_prompt": ""}, "an empty prompt"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, f"seed {2**32}"),
        ({"mask": Image.new("L", (49, 37))}, "a mask of 49 x 37 pixels"),
    ],
)
def test_a_bad_request_is_an_error(folder: Path, wanted: EditRequest, change: dict[str, Any], got: str) -> None:
    """Before anything is computed."""
    with pytest.raises(ImagicError, match=got):
        next(METHODS["ddim-inversion"].edit(Context(opened(folder)), replace(wanted, **change)))


def test_a_base_without_a_null_is_refused_where_one_is_needed(tmp_path: Path, wanted: EditRequest) -> None:
    """Image to image works on it, with as many passes as it says; an inversion does not."""
    base = opened(save_tiny(tmp_path / "base", scheduler="lcm", guided=True))
    (made,) = run(METHODS["sdedit"], base, wanted)
    assert METHODS["sdedit"].passes(base)["one"] == Passes(made.cost.forward)
    for name in [*NEEDING, "ddim-inversion", "edit-friendly", "magicmix"]:
        with pytest.raises(ImagicError, match="takes the guidance scale as an input"):
            METHODS[name].check(base, wanted)


@each(
    "make, problem",
    [
        (lambda: NullTextConfig(ablation="random-caption"), "other_captions"),
        (lambda: NullTextConfig(guidance_scale=1.0), "guidance_scale"),
        (lambda: MagicMixConfig(start=0.3, until=0.4), "until at most start"),
        (lambda: SamplingConfig(guidance_scale=0.5), "guidance_scale"),
        (lambda: SDEditConfig(skip=3), "skip"),  # pyright: ignore[reportCallIssue]
    ],
)
def test_settings_are_checked(make: Callable[[], Any], problem: str) -> None:
    """Values out of range, unknown names, and two that exclude each other."""
    with pytest.raises(ValidationError, match=problem):
        make()


# DDIM inversion and DDIB


@each("method, negative", [(DDIMInversion(), None), (NegativePromptInversion(), "a dog")])
def test_an_inversion_is_sampled_as_by_diffusers(base: Base, wanted: EditRequest, method: Any, negative: str | None) -> None:
    """The pipeline of diffusers gives the same from the inverted noise, with the source as its negative prompt or without."""
    config = SamplingConfig(steps=6, guidance_scale=4.0)
    request, found = encoded(base, wanted), inverted(method, base, wanted, config)
    null = base.encode_prompt(negative or "")
    kwargs = base.pipeline_kwargs(request.target, null)
    height, width = request.canvas.pixels.shape[2:]
    sampling = {"num_inference_steps": 6, "guidance_scale": 4.0, "height": height, "width": width, "output_type": "latent"}
    pipe: Any = base.pipeline("text2image", DDIMScheduler)
    expected = pipe(latents=found.path[0], **kwargs, **sampling).images
    torch.testing.assert_close(latents_of(method, base, wanted, config), expected, rtol=1e-4, atol=1e-4)


def test_ddib_reproduces_the_photo_better_with_more_steps(base: Base, wanted: EditRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal prompts and without guidance, in proportion; it is DDIM inversion with the source prompt."""
    plain = SamplingConfig(**GUIDED)
    found = latents_of(DDIB(), base, wanted, DDIBConfig(**GUIDED))
    assert torch.equal(found, latents_of(DDIMInversion(), base, wanted, plain))
    monkeypatch.setattr(base, "predict", Gaussian(base))
    errors = []
    for steps in (10, 20, 40):
        cycle = inverted(DDIB(), base, wanted, DDIBConfig(steps=steps, guidance_scale=1.0))
        errors.append(float((cycle.reconstructed(1.0) - cycle.path[steps]).square().mean().sqrt()))
    assert 1.6 < errors[0] / errors[1] < 2.4
    assert 1.6 < errors[1] / errors[2] < 2.4


@each("method", [DDIMInversion(), EditFriendly()])
def test_an_inversion_may_be_sampled_with_several_prompts_at_once(base: Base, wanted: EditRequest, method: Any) -> None:
    """Each sample is what its prompt alone gives."""
    config = method.config_class(**GUIDED) if method.name == "ddim-inversion" else EditFriendlyConfig(skip=1, **GUIDED)
    found, request = inverted(method, base, wanted, config), encoded(base, wanted)
    pairs = [concatenate([source, request.target]) for source in found.sources]
    both = last(found.path[found.start], found.sample(pairs, 3.0))
    torch.testing.assert_close(both[:1], found.reconstructed(3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], found.edited(request.target, 3.0), rtol=1e-4, atol=1e-4)


# negative-prompt inversion and proximal guidance


def test_negative_prompt_inversion_reproduces_at_every_scale(base: Base, wanted: EditRequest) -> None:
    """With equal prompts the guidance scale has no say: it is DDIM inversion without guidance."""
    equal = replace(wanted, target_prompt="a dog")
    plain = latents_of(DDIMInversion(), base, equal, SamplingConfig(steps=5, guidance_scale=1.0))
    for scale in (1.0, 3.0, 7.5):
        found = latents_of(NegativePromptInversion(), base, equal, SamplingConfig(steps=5, guidance_scale=scale))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    guided = latents_of(DDIMInversion(), base, equal, SamplingConfig(steps=5, guidance_scale=7.5))
    assert (guided - plain).abs().max() > 0.01


def test_proximal_guidance_lies_between_no_edit_and_negative_prompt_inversion(base: Base, wanted: EditRequest) -> None:
    """With no small differences it is that; with small ones only, it is the reconstruction, or, moved back all the way, the photo."""
    settings: dict[str, Any] = {"steps": 5, "guidance_scale": 6.0}
    negative = latents_of(NegativePromptInversion(), base, wanted, SamplingConfig(**settings))
    plain = latents_of(NegativePromptInversion(), base, replace(wanted, target_prompt="a dog"), SamplingConfig(**settings))
    assert (negative - plain).abs().max() > 0.2
    for threshold in ("hard", "soft"):
        all_large = ProximalConfig(quantile=0.0, pull=0.0, threshold=threshold, **settings)
        found = latents_of(ProximalInversion(), base, wanted, all_large)
        torch.testing.assert_close(found, negative, rtol=0, atol=0.02)  # the smallest difference of each step counts as small
        all_small = ProximalConfig(quantile=1.0, pull=0.0, threshold=threshold, **settings)
        torch.testing.assert_close(latents_of(ProximalInversion(), base, wanted, all_small), plain, rtol=1e-4, atol=1e-4)
    pulled = ProximalConfig(quantile=1.0, pull=1.0, **settings)
    torch.testing.assert_close(latents_of(ProximalInversion(), base, wanted, pulled), encoded(base, wanted).clean)
    never = ProximalConfig(quantile=1.0, pull=1.0, pull_below=0, **settings)
    torch.testing.assert_close(latents_of(ProximalInversion(), base, wanted, never), plain, rtol=1e-4, atol=1e-4)


def test_the_parts_of_proximal_guidance() -> None:
    """The quantile is that of each sample over all of its channels; soft shrinks; a mask grows by its radius in its own channel."""
    values = torch.tensor([[1.0, -2.0], [3.0, -4.0]]).view(1, 1, 2, 2)
    both = torch.cat([values, 10 * values])
    assert quantiles(both.abs(), 0.5).flatten().tolist() == [2.5, 25.0]
    limit = torch.full((1, 1, 1, 1), 2.0)
    assert thresholded(values, limit, "hard").flatten().tolist() == [0, 0, 3, -4]
    assert thresholded(values, limit, "soft").flatten().tolist() == [0, 0, 1, -2]
    mask = torch.zeros(1, 2, 5, 5)
    mask[0, 0, 2, 2] = 1
    assert dilated(mask, 1)[0, 0].sum() == 9
    assert dilated(mask, 1)[0, 1].sum() == 0
    assert torch.equal(dilated(mask, 0), mask)


# null-text inversion


def test_null_text_inversion_without_inner_steps_is_ddim_inversion(base: Base, wanted: EditRequest) -> None:
    """At the same guidance scale."""
    found = latents_of(NullTextInversion(), base, wanted, null_text(inner_steps=0))
    torch.testing.assert_close(found, latents_of(DDIMInversion(), base, wanted, SamplingConfig(**GUIDED)), rtol=1e-4, atol=1e-4)


def by_hand(base: Base, wanted: EditRequest, config: NullTextConfig) -> list[Tensor]:
    """The nulls of the official code, from the equations of DDIM for a base that predicts the noise."""
    request, scheduler = encoded(base, wanted), base.scheduler(DDIMScheduler)
    scheduler.set_timesteps(config.steps)
    times, gap = scheduler.timesteps.tolist(), 1000 // config.steps

    def level(t: int) -> Tensor:
        return scheduler.alphas_cumprod[max(t, 0)]

    def move(z: Tensor, noise: Tensor, t: int, to: int) -> Tensor:
        clean = (z - (1 - level(t)).sqrt() * noise) / level(t).sqrt()
        return level(to).sqrt() * clean + (1 - level(to)).sqrt() * noise

    def noise_at(z: Tensor, t: int, tokens: Tensor) -> Tensor:
        return base.denoiser(z, t, tokens).sample

    assert request.source is not None
    assert request.null is not None
    pivots = [request.clean]
    with torch.no_grad():
        for t in reversed(times):
            pivots.append(move(pivots[-1], noise_at(pivots[-1], t, request.source.tokens), t - gap, t))
    found, null, z = [], request.null.tokens.clone(), pivots[-1]
    for i, t in enumerate(times):
        null = null.clone().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=config.learning_rate * (1 - i / (2 * config.steps)))
        with torch.no_grad():
            conditional = noise_at(z, t, request.source.tokens)
        for _ in range(config.inner_steps):
            unconditional = noise_at(z, t, null)
            guided = unconditional + config.guidance_scale * (conditional - unconditional)
            loss = (move(z, guided, t, t - gap) - pivots[len(pivots) - i - 2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < config.stop_below * (1 + 100 * i / config.steps):
                break
        null = null.detach()
        found.append(null)
        with torch.no_grad():
            unconditional, conditional = noise_at(z, t, null), noise_at(z, t, request.source.tokens)
            z = move(z, unconditional + config.guidance_scale * (conditional - unconditional), t, t - gap)
    return found


@each("stop_below", [0.0, 2e-5])
def test_null_text_inversion_is_that_of_the_official_code(base: Base, wanted: EditRequest, stop_below: float) -> None:
    """The null of every step, with and without the early stop."""
    config = null_text(stop_below=stop_below, inner_steps=4)
    found = inverted(NullTextInversion(), base, wanted, config)
    for null, expected in zip(found.nulls, by_hand(base, wanted, config), strict=True):
        torch.testing.assert_close(null.tokens, expected, rtol=1e-3, atol=1e-3)


def test_null_text_inversion_reproduces_the_photo_better_than_ddim(base: Base, wanted: EditRequest) -> None:
    """With guidance, and better with more inner steps; all that changes is the tokens of the null."""
    config = null_text(inner_steps=8, learning_rate=0.05)
    plain, found = (inverted(NullTextInversion(), base, wanted, null_text(inner_steps=n, learning_rate=0.05)) for n in (0, 8))
    clean = found.path[4]
    errors = [psnr(one.reconstructed(config.guidance_scale), clean) for one in (plain, found)]
    assert errors[1] > errors[0] + 0.5
    assert all(torch.equal(source.tokens, plain.sources[0].tokens) for source in found.sources)
    assert len({null.tokens.numpy().tobytes() for null in found.nulls}) == 4


@pytest.fixture(scope="module")
def ablated(folder: Path, wanted: EditRequest) -> Callable[[Any], Any]:
    """The inversion of an ablation, made once."""
    return cache(lambda ablation: inverted(NullTextInversion(), opened(folder), wanted, null_text(ablation=ablation, learning_rate=0.03)))


@pytest.mark.slow
@each(
    "ablation, moving, count",
    [
        ("none", "nulls", 4),
        ("random-pivot", "nulls", 4),
        ("global", "nulls", 1),
        ("random-caption", "nulls", 4),
        ("textual-inversion", "sources", 1),
        ("pivotal-textual-inversion", "sources", 4),
        ("no-pivot", "nulls", 1),
    ],
)
def test_an_ablation_optimises_what_it_says(
    ablated: Any, folder: Path, wanted: EditRequest, ablation: str, moving: str, count: int
) -> None:
    """One embedding or one for each step, of the null or of the source; the other is the encoded prompt; the clean end is the photo."""
    found, request = ablated(ablation), encoded(opened(folder), wanted)
    tokens = {name: [one.tokens for one in getattr(found, name)] for name in ("nulls", "sources")}
    caption = opened(folder).encode_prompt("a hen").tokens, opened(folder).encode_prompt("a fox").tokens
    assert request.null is not None
    assert request.source is not None
    plain = {"nulls": (request.null.tokens,), "sources": caption if ablation == "random-caption" else (request.source.tokens,)}
    fixed = "sources" if moving == "nulls" else "nulls"
    assert len({one.numpy().tobytes() for one in tokens[moving]}) == count
    assert not any(torch.equal(one, start) for one in tokens[moving] for start in plain[moving])
    assert any(torch.equal(tokens[fixed][0], start) for start in plain[fixed])
    assert len({one.numpy().tobytes() for one in tokens[fixed]}) == 1
    assert torch.equal(found.path[4], request.clean)


def test_a_random_pivot_is_the_photo_with_one_noise(ablated: Any, folder: Path, wanted: EditRequest) -> None:
    """At every level; the other pivots are the inversion."""
    base = opened(folder)
    request, found = encoded(base, wanted), ablated("random-pivot")
    for position in range(4):
        expected = base.noised(request.clean, request.noise(), torch.tensor([found.trajectory.timesteps[position]]))
        torch.testing.assert_close(found.path[position], expected)
    plain = inverted(DDIMInversion(), base, wanted, SamplingConfig(**GUIDED))
    assert all(torch.equal(ablated("global").path[p], plain.path[p]) for p in range(5))


def test_ablations_improve_on_ddim_inversion_where_the_paper_says_so(ablated: Any, base: Base, wanted: EditRequest) -> None:
    """With a pivot the photo comes back better than from DDIM inversion with guidance, whichever embedding is optimised for each step."""
    plain = inverted(DDIMInversion(), base, wanted, SamplingConfig(**GUIDED))
    bound = psnr(plain.reconstructed(3.0), plain.path[4])
    for ablation in ("none", "global", "pivotal-textual-inversion"):
        assert psnr(ablated(ablation).reconstructed(3.0), plain.path[4]) > bound, ablation


def test_vqae_is_the_photo_through_the_vae(base: Base, wanted: EditRequest) -> None:
    """No diffusion, and no inversion that another method could use."""
    config = null_text(ablation="vqae")
    assert torch.equal(latents_of(NullTextInversion(), base, wanted, config), encoded(base, wanted).clean)
    with pytest.raises(ImagicError, match="vqae"):
        inverted(NullTextInversion(), base, wanted, config)


# edit-friendly inversion


@each("skip, eta", [(0, 1.0), (0, 0.5), (2, 1.0), (5, 1.0)])
def test_edit_friendly_inversion_reproduces_the_photo(base: Base, wanted: EditRequest, skip: int, eta: float) -> None:
    """With equal prompts and scales, from any step."""
    config = EditFriendlyConfig(steps=5, guidance_scale=2.0, source_guidance_scale=2.0, skip=skip, ddim_eta=eta)
    found = latents_of(EditFriendly(), base, replace(wanted, target_prompt="a dog"), config)
    torch.testing.assert_close(found, encoded(base, wanted).clean, rtol=1e-4, atol=1e-4)


def test_skipping_all_steps_gives_the_photo(base: Base, wanted: EditRequest) -> None:
    """Bit for bit, whatever the prompts; a step more is an error; a step less is an edit; each step less changes more."""
    clean = encoded(base, wanted).clean
    found = [latents_of(EditFriendly(), base, wanted, EditFriendlyConfig(skip=skip, **GUIDED)) for skip in (4, 3, 1)]
    distances = [float((one - clean).abs().mean()) for one in found]
    assert 0 == distances[0] < distances[1] < distances[2]
    with pytest.raises(ImagicError, match="skip 5 with 4 steps"):
        next(EditFriendly({"row": EditFriendlyConfig(skip=5, **GUIDED)}).edit(Context(base), wanted))


def test_edit_friendly_inversion_is_that_of_stage_3(base: Base, wanted: EditRequest) -> None:
    """Without skipped steps and with a source guidance of 1, it is ``start: inverted`` with a ddim_eta: another implementation."""
    request = encoded(base, wanted)
    assert request.source is not None
    config = EditConfig(steps=6, guidance_scale=3.0, start="inverted", ddim_eta=1.0)
    (expected,) = generate(base, [request.target], [wanted.seed], config, request.canvas, request.null, [request.source])
    settings = EditFriendlyConfig(steps=6, guidance_scale=3.0, source_guidance_scale=1.0, skip=0)
    (made,) = run(EditFriendly({"one": settings}), base, wanted)
    assert np.abs(array(made.image) - array(expected)).max() <= 1


# ReNoise


def test_renoise_without_iterations_is_ddim_inversion(base: Base, wanted: EditRequest) -> None:
    """Bit for bit; with the source as negative prompt it is negative-prompt inversion."""
    for negative, method in ((False, DDIMInversion()), (True, NegativePromptInversion())):
        found = latents_of(ReNoise(), base, wanted, ReNoiseConfig(iterations=0, negative_source=negative, **GUIDED))
        assert torch.equal(found, latents_of(method, base, wanted, SamplingConfig(**GUIDED)))


@each("kind", ["epsilon", "v_prediction"])
def test_renoise_converges_to_the_inverse_of_ddim(
    folders: dict[str, Path], wanted: EditRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photo comes back better with each iteration, at last to rounding."""
    base, errors = opened(folders[kind]), []
    monkeypatch.setattr(base, "predict", Gaussian(base))
    for iterations in (0, 1, 3, 40):
        found = inverted(ReNoise(), base, wanted, ReNoiseConfig(iterations=iterations, **GUIDED))
        errors.append(float((found.reconstructed(1.0) - found.path[4]).abs().max()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4


def test_renoise_averages_the_iterations_it_is_told_to(base: Base, wanted: EditRequest) -> None:
    """The latents of the first step: the mean of those of the iterations, each alone."""
    singles = [inverted(ReNoise(), base, wanted, ReNoiseConfig(iterations=n, **GUIDED)).path[3] for n in range(4)]
    for first in range(4):
        config = ReNoiseConfig(iterations=3, average_from=first, **GUIDED)
        found = inverted(ReNoise(), base, wanted, config).path[3]
        torch.testing.assert_close(found, torch.stack(singles[first:]).mean(0))


# MagicMix


def test_magicmix_without_mixing_is_sdedit(base: Base, wanted: EditRequest) -> None:
    """At weight 1 from the highest level of the mix; at weight 0 from the lowest, with the same noise."""
    settings: dict[str, Any] = {"steps": 10, "guidance_scale": 3.0}
    for mix, strength in ((1.0, 0.6), (0.0, 0.3)):
        (made,) = run(MagicMix({"one": MagicMixConfig(mix=mix, **settings)}), base, wanted)
        (expected,) = run(SDEdit({"one": SDEditConfig(strength=strength, **settings)}), base, wanted)
        assert np.abs(array(made.image) - array(expected.image)).max() <= 1
    half = latents_of(MagicMix(), base, wanted, MagicMixConfig(mix=0.5, **settings))
    for mix in (0.0, 1.0):
        assert not torch.equal(half, latents_of(MagicMix(), base, wanted, MagicMixConfig(mix=mix, **settings)))


def test_the_layout_of_a_prompt_is_its_picture(base: Base, wanted: EditRequest) -> None:
    """That of the source prompt alone at the same seed; the photo has no say but for its size."""
    (made,) = run(METHODS["magicmix-text"], base, wanted)
    (layout,) = run(METHODS["prompt-only"], base, replace(wanted, target_prompt="a dog"))
    assert np.abs(array(made.extras["layout"]) - array(layout.image)).max() <= 1
    (other,) = run(METHODS["magicmix-text"], base, replace(wanted, photo=Image.new("RGB", wanted.photo.size)))
    assert np.array_equal(array(made.image), array(other.image))
