"""Stable Diffusion 3: our Euler steps, loss, files and checks against diffusers itself."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import MODES, PROMPT, array, by_diffusers, by_pipeline, each, opened, same, slow_but, tiny_config, weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Img2ImgPipeline
from diffusers import StableDiffusion3Pipeline as Pipeline
from PIL import Image
from safetensors.torch import load_file
from test_keys import arguments, of_text_encoders, popped, said
from tiny import save_tiny_sd3
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, T5Config, T5Tokenizer

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.export import export
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.layers import text_parameters
from imagic_lora.bases.loading.components import TEXT_ENCODERS
from imagic_lora.bases.loading.configs import architecture_at
from imagic_lora.bases.loading.flow_keys import SD3_KEYS
from imagic_lora.bases.loading.known import BaseEntry
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.bases.loading.vetting import FLOW_FAMILIES
from imagic_lora.bases.process import Flow
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.errors import ImagicError, Stopped
from imagic_lora.memory.plan import Assumed
from imagic_lora.memory.prediction import predict
from imagic_lora.memory.symbolic.layers import NotPlanned
from imagic_lora.methods.generated import generation_passes
from imagic_lora.methods.imagic import Imagic
from imagic_lora.methods.inversions.ddim import DDIMInversion
from imagic_lora.methods.method import Context, EditRequest, metered
from imagic_lora.photos.canvas import Canvas
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.flow import FlowSampler
from imagic_lora.sampling.generate import generate
from imagic_lora.training.fit import fit, result
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.rehearsing.rehearsal import rehearse

Fit = Callable[[Mode], Adapter]
TEXT = "a cat on a mat"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with all three text encoders."""
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "base")


@pytest.fixture(scope="module")
def plain(sd3: Path) -> Pipeline:
    """The base, loaded by diffusers alone; tests do not change it."""
    pipe = Pipeline.from_pretrained(sd3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def fit_on(sd3: Path, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Gives the adapter of a mode, fitted once; the LoRA alpha differs from the rank."""
    store = Store(tmp_path_factory.mktemp("fitted"))

    @cache
    def make(mode: Mode) -> Adapter:
        made = result(fit(photo_file, PROMPT, config_of(sd3, mode), store, mode))
        assert made is not None
        return made

    return make


def config_of(folder: Path, mode: Mode = "lora", **changes: Any) -> Any:
    """Tiny settings with layers that a transformer has."""
    return tiny_config(folder, mode, **({"tune": {"targets": "attention+mlp"}} if mode == "lora" else {}), **changes)


def canvas(height: int = 32, width: int = 24) -> Canvas:
    """A photo of that size."""
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return Canvas(torch.stack([down, across, (9 * across).sin()])[None], (0, 0, width, height), (width, height))


def sampled(base: Base, config: EditConfig, seeds: list[int], text: str = TEXT, negative: Conditioning | None = None) -> Tensor:
    """The latents of our sampler."""
    one = base.encode_prompt(text)
    return FlowSampler(base, config, canvas(), negative or base.null()).latents([one] * len(seeds), seeds, [one] * len(seeds))


# Against diffusers


@each("steps, guidance, shift", [(1, 4.0, 3.0), (7, 4.0, 3.0), (28, 1.0, 3.0), (5, 7.0, 1.0)])
def test_our_steps_are_those_of_diffusers(tmp_path: Path, steps: int, guidance: float, shift: float) -> None:
    """The same noise, steps and guidance give the same latents, to 1e-4."""
    folder = save_tiny_sd3(tmp_path / "base", shift=shift)
    pipe: Any = Pipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 32, "width": 24}
    expected = pipe(prompt=[TEXT] * 2, **given, generator=generators, output_type="latent").images
    found = sampled(opened(folder), EditConfig(steps=steps, guidance_scale=guidance), [3, 4])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_negative_prompt_leads_away_as_in_diffusers(sd3: Path, plain: Any) -> None:
    """It replaces the empty prompt."""
    base = opened(sd3)
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 32, "width": 24, "output_type": "latent"}
    expected = plain(prompt=TEXT, negative_prompt="a dog", generator=torch.Generator().manual_seed(3), **given).images
    found = sampled(base, EditConfig(steps=4, guidance_scale=5.0), [3], negative=base.encode_prompt("a dog"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - sampled(base, EditConfig(steps=4, guidance_scale=5.0), [3])).abs().max() > 1e-3


def test_the_start_from_the_photo_is_that_of_diffusers(sd3: Path, plain: Any) -> None:
    """Where the strength is a whole number of steps; its noise is ours, and the photo is encoded by the mode of the posterior."""
    base, config = opened(sd3), EditConfig(steps=8, guidance_scale=3.0, start="image", strength=0.5)
    clean = base.encode_image(canvas().pixels)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    pipe: Any = StableDiffusion3Img2ImgPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.prepare_latents = lambda *_: pipe.scheduler.scale_noise(clean, _[1], noise)
    given: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "strength": 0.5, "output_type": "latent"}
    expected = pipe(prompt=TEXT, image=canvas().pixels / 2 + 0.5, height=32, width=24, **given).images
    torch.testing.assert_close(sampled(base, config, [3]), expected, atol=1e-4, rtol=0)


def test_the_conditioning_is_that_of_diffusers(sd3: Path, plain: Any) -> None:
    """Tokens of both CLIP encoders and of T5, the pooled embedding, and the empty prompt; the mask has the words of each."""
    base = opened(sd3)
    with torch.no_grad():
        tokens, null, pooled, null_pooled = plain.encode_prompt(TEXT, None, None)
    for found, expected in ((base.encode_prompt(TEXT), (tokens, pooled)), (base.null(), (null, null_pooled))):
        assert found is not None
        torch.testing.assert_close(found.tokens, expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.pooled, expected[1], atol=1e-4, rtol=0)
    words = base.word_mask("a cat")[0]
    clip, t5 = (len(plain.tokenizer("a cat").input_ids), len(plain.tokenizer_3("a cat").input_ids))
    assert words.nonzero().flatten().tolist() == [*range(clip), *range(16, 16 + t5)]


def test_a_base_without_t5_has_zeros(tmp_path: Path) -> None:
    """As diffusers' pipeline has them; and it samples."""
    folder = save_tiny_sd3(tmp_path / "base", t5=False)
    pipe: Any = Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        expected = pipe.encode_prompt(TEXT, None, None)[0]
    base = opened(folder)
    torch.testing.assert_close(base.encode_prompt(TEXT).tokens, expected, atol=1e-4, rtol=0)
    assert base.architecture.conditioning["tokens"] == tuple(expected.shape)
    assert sampled(base, EditConfig(steps=2), [0]).isfinite().all()


def test_the_loss_is_that_of_diffusers_training_script(sd3: Path) -> None:
    """In float64: noise at the levels of its shifted grid, and the velocity from image to noise as the target."""
    base = opened(sd3)
    base.denoiser.double()
    conditioning = base.encode_prompt(TEXT).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(n, 4, 8, 8, dtype=torch.float64, generator=generator) for n in (1, 6))
    times = torch.tensor([0.0, 0.1, 0.33, 0.5, 0.9, 0.999], dtype=torch.float64)
    with torch.no_grad():
        found = denoising_loss(base, clean, conditioning, noise, times)
        grid = FlowMatchEulerDiscreteScheduler(shift=3.0)
        at = [len(grid.timesteps) - 1 - int(u * 1000) for u in times.tolist()]  # the grid descends
        sigmas = grid.sigmas[at].double().view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * clean + sigmas * noise
        model: Any = base.denoiser
        predicted = model(
            hidden_states=noisy,
            timestep=grid.timesteps[at],
            encoder_hidden_states=conditioning.tokens.expand(6, -1, -1),
            pooled_projections=conditioning.pooled.expand(6, -1),  # pyright: ignore[reportOptionalMemberAccess]
        ).sample
    expected = ((predicted - (noise - clean)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@each("what", ["sign", "scale of time", "sign of the target", "shift"])
def test_a_wrong_convention_is_found(sd3: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Each mistake that a family could make, made on purpose, fails the comparisons with diffusers above."""
    base: Any = opened(sd3)
    match what:
        case "sign":
            right = base.denoise
            monkeypatch.setattr(base, "denoise", lambda *arguments: -right(*arguments))
        case "scale of time":
            monkeypatch.setattr(base.process, "trained", 1)
        case "shift":
            monkeypatch.setattr(base.process, "shift", 2.0)
        case _:
            monkeypatch.setattr(Flow, "target", lambda self, clean, noise, timesteps: clean - noise)
    if what == "sign of the target":
        with pytest.raises(AssertionError):
            test_the_target_is_what_the_steps_integrate(sd3)
        return
    expected = plain(
        prompt=TEXT, num_inference_steps=4, guidance_scale=3.0, height=32, width=24,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sampled(base, EditConfig(steps=4, guidance_scale=3.0), [3]), expected, atol=1e-4, rtol=0)


def test_the_target_is_what_the_steps_integrate(sd3: Path) -> None:
    """A denoiser that predicts its target exactly leads from any noise to the photo, by our steps with and without noise in between."""
    base: Any = opened(sd3)
    clean = base.encode_image(canvas().pixels)

    def exact(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = timesteps.view(-1, 1, 1, 1)
        return base.target(clean, (x_t - (1 - sigma) * clean) / sigma, timesteps)

    base.predict = exact
    for ddim_eta in (0.0, 0.6, 1.0):
        found = sampled(base, EditConfig(steps=5, guidance_scale=1.0, ddim_eta=ddim_eta), [3])
        torch.testing.assert_close(found, clean, atol=1e-4, rtol=0)


def test_the_published_sizes_are_the_published_ones() -> None:
    """Of transformer, CLIP-L, bigG and T5-XXL; and text encoders are counted as transformers makes them."""
    found = {}
    for name in ("sd3-medium", "sd35-medium"):
        base = PUBLISHED[name]
        with torch.device("meta"):
            transformer: Any = SD3Transformer2DModel.from_config(base.denoiser)
            for part, config in base.text_encoders.items():
                kind = base.encoder_classes[part]
                config_class, model_class = TEXT_ENCODERS[kind]
                assert text_parameters(config, kind) == model_class(config_class(**config)).num_parameters()
        sizes = [text_parameters(config, base.encoder_classes[part]) for part, config in base.text_encoders.items()]
        found[name] = [sum(parameter.numel() for parameter in transformer.parameters()), *sizes]
    texts = [123_650_304, 694_659_840, 4_762_310_656]
    assert found == {"sd3-medium": [2_028_328_000, *texts], "sd35-medium": [2_243_171_520, *texts]}


# Starts


def test_steps_with_noise_keep_the_distribution(sd3: Path) -> None:
    """If every clean image is zero, the latents at a level are noise of that level: so they stay, whatever share is replaced."""
    base: Any = opened(sd3)
    base.predict = lambda x_t, timesteps, conditioning: x_t / timesteps.view(-1, 1, 1, 1)
    sampler = FlowSampler(base, EditConfig(steps=6, guidance_scale=1.0, ddim_eta=0.7), canvas(), None)
    latents, generator = torch.randn(4000, 4, 1, 1, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for step in sampler.trajectory.forwards(latents, sampler._velocity(base.null(), None), end=5):
        std = sampler.trajectory.standard_deviation(step.index)
        assert std > 0
        step.latents = step.latents + std * torch.randn(latents.shape, generator=generator)
        assert step.latents.std().item() == pytest.approx(sampler.trajectory.sigmas[step.end], rel=0.03)


def test_an_inverted_photo_comes_back(sd3: Path) -> None:
    """Exactly with recorded noise; nearly by Euler's steps backwards, the nearer the more steps."""
    base = opened(sd3)
    clean = base.encode_image(canvas().pixels)

    def lost(steps: int, ddim_eta: float) -> float:
        config = EditConfig(steps=steps, guidance_scale=1.0, start="inverted", ddim_eta=ddim_eta)
        return (sampled(base, config, [3]) - clean).abs().max().item()

    assert max(lost(4, ddim_eta) for ddim_eta in (0.3, 1.0)) < 1e-4
    assert lost(64, 0.0) < lost(8, 0.0) < (clean - sampled(base, EditConfig(steps=8, guidance_scale=1.0), [3])).abs().max()


@pytest.mark.parametrize("mode", slow_but(["lora"], MODES))
def test_an_adapter_edits_from_every_start(sd3: Path, fit_on: Fit, mode: Mode) -> None:
    """Pictures of the photo's size that depend on eta; the base is afterwards what it was; losses fall."""
    adapter, base = fit_on(mode), opened(sd3)
    before, editor = weights(base.denoiser), Editor(base)
    starts: list[tuple[Any, float]] = [("noise", 0.0), ("noise", 0.5), ("image", 0.0), ("inverted", 0.0), ("inverted", 1.0)]
    for start, ddim_eta in starts:
        config = EditConfig(steps=4, guidance_scale=3.0, start=start, ddim_eta=ddim_eta)
        pictures = [one.image for one in editor.edit(adapter, [0.0, 1.0], [0], config)]
        assert {picture.size for picture in pictures} == {read_canvas(adapter).size}
        assert (array(pictures[0]) != array(pictures[1])).any(), (start, ddim_eta)
    editor.close()
    assert same(weights(base.denoiser), before)


@each("changes", [{"scheduler": "ddim"}, {"scheduler": "dpm++2m"}, {"scheduler": "lcm"}, {"karras_sigmas": True}])
def test_schedulers_of_diffusion_are_refused_by_name(sd3: Path, fit_on: Fit, changes: dict[str, Any]) -> None:
    """Before anything is sampled."""
    name = changes.get("scheduler", "Karras sigmas")
    with pytest.raises(ImagicError, match=rf"{name}.* a flow. Expected: base or euler".replace("+", r"\+")):
        next(Editor(opened(sd3)).edit(fit_on("lora"), [0.5], [0], EditConfig(steps=2, **changes)))


# Files


@pytest.mark.parametrize("mode", slow_but(["lora", "embedding"], MODES))
def test_plain_diffusers_makes_the_same_picture(sd3: Path, fit_on: Fit, mode: Mode) -> None:
    """To 1 of 255, from the adapter's files alone: LoRA by load_lora_weights, a whole transformer by from_pretrained.
    So does the pipeline of the editor."""
    adapter, config = fit_on(mode), EditConfig(steps=4, guidance_scale=3.0)
    editor = Editor(opened(sd3))
    edited = array(next(editor.edit(adapter, [0.6], [5], config)).image)
    assert np.abs(edited - array(by_diffusers(Pipeline.from_pretrained(sd3), adapter, 0.6, 5, config))).max() <= 1
    with editor.pipeline(adapter, 0.6, config) as edit:
        assert np.abs(edited - array(by_pipeline(edit, 5))).max() <= 1


@each("changes, match", [({"ddim_eta": 0.5}, "ddim_eta 0.5"), ({"guidance_rescale": 0.7}, "guidance_rescale 0.7")])
def test_what_diffusers_pipeline_lacks_is_refused(sd3: Path, fit_on: Fit, changes: dict[str, Any], match: str) -> None:
    """Our own edit has it."""
    config = EditConfig(steps=2, guidance_scale=3.0, **changes)
    with pytest.raises(ImagicError, match=match), Editor(opened(sd3)).pipeline(fit_on("lora"), 0.6, config):
        pass


def test_both_embeddings_are_trained(fit_on: Fit) -> None:
    """Tokens and pooled; shapes are those that a plan knows."""
    stored = read_embeddings(fit_on("lora"))
    for name, value in stored["target"].tensors().items():
        assert not torch.equal(value, stored["optimised"].tensors()[name]), name


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_stopped_fit_resumes_to_the_same_bytes(sd3: Path, photo_file: Path, fit_on: Fit, tmp_path: Path, mode: Mode) -> None:
    """In the middle of stage 2."""
    store, seen = Store(tmp_path), iter([False] * 5)
    with pytest.raises(Stopped):
        result(fit(photo_file, PROMPT, config_of(sd3, mode), store, "one", stop=lambda: next(seen, True)))
    resumed = result(fit(photo_file, PROMPT, config_of(sd3, mode), store, "one", resume=True))
    assert resumed is not None
    for name in ("embeddings.safetensors", *resumed.record.weight_files):
        assert (resumed.folder / name).read_bytes() == (fit_on(mode).folder / name).read_bytes(), name


def test_every_layer_has_a_lora_preset(sd3: Path, photo_file: Path, fit_on: Fit, tmp_path: Path) -> None:
    """Preset all covers every linear and convolutional layer, and a compressed adapter makes nearly the picture of the full one."""
    base = opened(sd3)
    ends = tuple(f".{end}" for end in base.lora_targets("all"))
    layers = [name for name, module in base.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert [name for name in layers if not f".{name}".endswith(ends)] == []
    made = compress(fit_on("full"), base, 64, Store(tmp_path), "small")
    config = EditConfig(steps=3, guidance_scale=3.0)
    one, other = (next(Editor(opened(sd3)).edit(adapter, [0.6], [5], config)).image for adapter in (fit_on("full"), made))
    assert np.abs(array(one) - array(other)).mean() < 3
    with pytest.raises(ImagicError, match=r"--targets attention\+conv on .*transformer. Expected: one of attention, attention\+mlp, all"):
        result(fit(photo_file, PROMPT, tiny_config(sd3), Store(tmp_path), "other"))


def test_an_export_has_the_names_that_comfyui_reads(sd3: Path, fit_on: Fit, tmp_path: Path) -> None:
    """``lora_transformer_`` and diffusers' name with underscores, derived here from the model; the scale is in the matrices."""
    adapter = fit_on("lora")
    tune = adapter.record.config.tune
    written = load_file(export(adapter, "kohya", tmp_path)[0])
    model: Any = SD3Transformer2DModel.from_pretrained(sd3 / "transformer")
    parts = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2")
    wanted = {f"lora_transformer_{name.replace('.', '_')}" for name, _ in model.named_modules() if name.endswith(parts)}
    assert {name.partition(".")[0] for name in written} == wanted
    stored = load_file(adapter.folder / "pytorch_lora_weights.safetensors")
    layer, key = "transformer_blocks.0.attn.add_q_proj", "lora_transformer_transformer_blocks_0_attn_add_q_proj"
    product = written[f"{key}.lora_up.weight"] @ written[f"{key}.lora_down.weight"] * written[f"{key}.alpha"] / tune.rank
    expected = stored[f"transformer.{layer}.lora_B.weight"] @ stored[f"transformer.{layer}.lora_A.weight"] * tune.alpha / tune.rank
    torch.testing.assert_close(product, expected)


def test_the_fingerprint_is_of_the_weights(sd3: Path, fit_on: Fit, tmp_path: Path) -> None:
    """Equal in half precision; another one for other weights and without T5, whose adapters are refused."""
    half = save_tiny_sd3(tmp_path / "half", dtype=torch.float16)
    assert opened(half).fingerprint == opened(sd3).fingerprint
    for name, other in {"seed": {"seed": 1}, "t5": {"t5": False}}.items():
        base = opened(save_tiny_sd3(tmp_path / name, **other))
        assert base.fingerprint != opened(sd3).fingerprint
        with pytest.raises(ImagicError, match="was made for base"):
            next(Editor(base).edit(fit_on("lora"), [0.5], [0], EditConfig(steps=2)))


# What is said and not honoured is refused


def of_tokenizer() -> set[str]:
    made: list[Any] = [one.__init__ for one in T5Tokenizer.__mro__ if "__init__" in vars(one) and one is not object]
    every = arguments(T5Tokenizer.__init__) | popped(*made) | set(T5Tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    return {name for name in every if not name.startswith("_")}  # these are not stored in files


def of_t5() -> set[str]:
    every = {one.name for one in fields(T5Config)} | popped(PretrainedConfig.__post_init__, T5Config.__post_init__)
    return every | set(GenerationConfig._get_default_generation_params())  # pyright: ignore[reportAttributeAccessIssue]


FILES = {
    part: f"{part}/{'scheduler_config' if part == 'scheduler' else 'tokenizer_config' if part.startswith('tokenizer') else 'config'}.json"
    for part in SD3_KEYS
} | {"model_index": "model_index.json"}
KNOWN: dict[str, Callable[[], set[str]]] = {
    "transformer": lambda: arguments(SD3Transformer2DModel.__init__),
    "vae": lambda: arguments(AutoencoderKL.__init__),
    "text_encoder": of_text_encoders,
    "text_encoder_3": of_t5,
    "tokenizer_3": of_tokenizer,
    "scheduler": lambda: arguments(FlowMatchEulerDiscreteScheduler.__init__),
    "model_index": lambda: set().union(
        *(arguments(__import__("diffusers").__dict__[name].__init__) for name in FLOW_FAMILIES if "3" in name)
    ),
}


@each("part", list(KNOWN))
def test_every_key_is_in_one_list(part: str) -> None:
    """A key that a new version of diffusers or transformers adds fails here until somebody sorts it into SD3_KEYS."""
    keys, known = SD3_KEYS[part], KNOWN[part]()
    lists = [keys.honoured, keys.harmless, frozenset(keys.refused)]
    assert len(known) > 10
    assert known - frozenset().union(*lists) == set()
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


UNHEARD = [(FILES[part], name, "x" if value != "x" else "y") for part, keys in SD3_KEYS.items() for name, value in keys.refused.items()]
UNHEARD += [(file, "a_setting_of_tomorrow", 0.5) for file in (*FILES.values(), "tokenizer_2/tokenizer_config.json")]


@pytest.mark.slow
@each("file, name, value", UNHEARD)
def test_a_setting_that_nothing_honours_is_refused_by_its_name(sd3: Path, tmp_path: Path, file: str, name: str, value: Any) -> None:
    """With its file."""
    base = said(sd3, tmp_path / "base", file, **{name: value})
    with pytest.raises(ImagicError, match=rf"{file} has {name} = .*, which is not supported"):
        opened(base) if file.startswith("tokenizer") else architecture_of(str(base))


@each(
    "file, values, message",
    [
        ("transformer/config.json", {"num_layers": 10**6}, "implausible settings: 'transformer.num_layers'"),
        ("transformer/config.json", {"joint_attention_dim": 64}, "d_model of T5 and joint_attention_dim, 48 and 64"),
        ("transformer/config.json", {"pooled_projection_dim": 41}, "pooled_projection_dim, 40 and 41"),
        ("transformer/config.json", {"caption_projection_dim": 24}, "caption_projection_dim and width of the transformer, 24 and 16"),
        ("transformer/config.json", {"dual_attention_layers": [5]}, "dual_attention_layers"),
        ("transformer/config.json", {"dual_attention_layers": [True]}, "dual_attention_layers"),
        ("transformer/config.json", {"pos_embed_max_size": 2}, "sample_size 8"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels of the VAE and in_channels of the transformer, 16 and 4"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "'scheduler.shift'"),
        ("scheduler/scheduler_config.json", {"shift": "3"}, "'scheduler.shift'"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "not known to be that of rectified flow"),
        ("model_index.json", {"text_encoder": [None, None]}, r"as text_encoder. Expected: CLIPTextModelWithProjection"),
        ("model_index.json", {"text_encoder_3": [None, None]}, "as tokenizer_3|as text_encoder_3"),
        ("model_index.json", {"transformer": ["evil", "Model"]}, "as transformer. Expected: SD3Transformer2DModel"),
        ("text_encoder_3/config.json", {"d_ff": 64}, "weights. Expected: the"),
        ("text_encoder_3/config.json", {"dense_act_fn": "os.system"}, "cannot be loaded"),
    ],
)
def test_a_hostile_config_is_refused(sd3: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    """By name, on opening."""
    with pytest.raises(ImagicError, match=message):
        opened(said(sd3, tmp_path / "base", file, **values))


@each(
    "change, message",
    [
        (lambda content: content["model"].update(type="BPE"), "not the tokenizer of T5"),
        (lambda content: content["model"].update(unk_id=0), "not the tokenizer of T5"),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "another normalizer than T5"),
        (lambda content: content.update(truncation={"direction": "Left"}), "truncation with the direction 'Left'"),
        (lambda content: content["model"]["vocab"].append(["word", -1.0]), "has the token id"),
    ],
)
def test_a_hostile_tokenizer_is_refused(sd3: Path, tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    """What transformers would leave out in silence, or ids that the text encoder does not have."""
    shutil.copytree(sd3, tmp_path / "base")
    path = tmp_path / "base/tokenizer_3/tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ImagicError, match=message):
        opened(tmp_path / "base")


@each("entry, message", [({"prediction": "epsilon"}, "prediction epsilon.*a flow")])
def test_a_list_of_bases_cannot_say_what_a_flow_is_not(sd3: Path, entry: dict[str, Any], message: str) -> None:
    """It would be ignored."""
    with pytest.raises(ImagicError, match=message):
        architecture_at(sd3, BaseEntry(source=str(sd3), **entry))
    assert architecture_at(sd3, BaseEntry(source=str(sd3), prediction="flow", resolution=16)).resolution == 16


def test_a_photo_beyond_the_positions_is_refused(sd3: Path) -> None:
    """The transformer has positions for 64 pixels a side."""
    with pytest.raises(ImagicError, match=r"an image of 72x32 pixels\. Expected: at most 64 pixels a side"):
        opened(sd3).encode_image(canvas(32, 72).pixels)


def test_levels_are_those_of_diffusers_scheduler() -> None:
    """For any shift and number of steps."""
    for shift, steps in ((3.0, 28), (1.0, 10), (6.93, 50), (0.5, 3)):
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(steps)
        torch.testing.assert_close(Flow(shift).sigmas(steps, 1), theirs.sigmas, atol=1e-6, rtol=0)
        assert math.isclose(Flow(shift).sigmas(steps, 1)[0].item(), 1.0)
    assert "mu" in inspect.signature(FlowMatchEulerDiscreteScheduler.set_timesteps).parameters


@pytest.mark.slow
def test_its_memory_is_predicted_by_a_rehearsal(sd3: Path, fit_on: Fit) -> None:
    """No formula knows a transformer; the rehearsal runs its stages, and counts weights and LoRA layers as they are."""
    architecture, base = architecture_of(str(sd3)), opened(sd3)
    run, assumed = config_of(sd3), Assumed("cpu", "fp32", "adam")
    with pytest.raises(NotPlanned, match="a transformer"):
        predict(architecture, run, assumed)
    plan = rehearse(architecture, run, assumed)
    assert list(plan.stages) == ["encode", "embed", "tune", "sample", "decode"]
    stored = load_file(fit_on("lora").folder / "pytorch_lora_weights.safetensors")
    lora = sum(value.numel() * 4 for value in stored.values())
    assert plan.stages["tune"].gradients == lora
    assert plan.stages["tune"].optimizer == pytest.approx(2 * lora, abs=1024)
    assert plan.stages["tune"].weights - plan.stages["embed"].weights + plan.stages["embed"].gradients == lora
    modules = [base.denoiser, *base._helpers.values()]  # pyright: ignore[reportAttributeAccessIssue]
    weights = sum(one.nbytes for module in modules for one in (*module.parameters(), *module.buffers()))
    assert plan.stages["encode"].weights == pytest.approx(weights, rel=0.01)
    full = rehearse(architecture, config_of(sd3, "full"), assumed)
    parameters = sum(4 * parameter.numel() for parameter in base.denoiser.parameters())
    assert full.stages["tune"].gradients == parameters


@pytest.mark.slow
@each("idle, alone", [("keep", False), ("release", True)])
def test_t5_is_alone_on_the_card(sd3: Path, monkeypatch: pytest.MonkeyPatch, idle: Any, alone: bool) -> None:
    """Unless everything stays there: the VAE and CLIP leave before T5 comes, and the plan counts T5 alone."""
    base: Any = opened(sd3, idle=idle)
    place = {id(helper): "card" for helper in base._helpers.values()}
    named = {id(helper): name for name, helper in base._helpers.items()}
    seen: list[set[str]] = []

    def move(module: Any, device: Any = None) -> None:
        place[id(module)] = "host" if device is not None else "card"
        if named[id(module)] == "text_encoder_3":
            seen.append({named[one] for one, where in place.items() if where == "card"})

    monkeypatch.setattr(base, "_move", move)
    base.encode_image(canvas().pixels)
    base.encode_prompt(TEXT)
    assert seen == [{"text_encoder_3"} if alone else {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}]
    run = config_of(sd3, memory={"device": "cuda", "idle": idle})
    weights = rehearse(architecture_of(str(sd3)), run, Assumed("cuda", "bf16", "adam")).stages["encode"].weights
    sizes = [size // 2 for size in base.helper_bytes()]
    denoiser = sum(one.nbytes for one in (*base.denoiser.parameters(), *base.denoiser.buffers())) // 2
    assert weights == pytest.approx(max(sizes) if alone else sum(sizes) + denoiser, rel=0.02)


@each("start", ["noise", "image", "inverted"])
def test_methods_on_a_flow_take_the_passes_that_they_predict(sd3: Path, start: Any) -> None:
    """Imagic and sampling from a prompt; methods that walk the levels of DDIM refuse a transformer by name."""
    base, edit = opened(sd3), EditConfig(steps=4, guidance_scale=3.0, start=start, batch_size=1)
    request = EditRequest(Image.new("RGB", (50, 37), "red"), PROMPT)
    imagic = Imagic("imagic", config_of(sd3, edit={"steps": 4, "guidance_scale": 3.0, "start": start}))
    with metered(base) as meter:
        one = base.encode_prompt(PROMPT)
        list(generate(base, [one], [0], edit, canvas(), base.null(), [one]))
    assert meter.forward == generation_passes(base, edit).forward
    (found,) = imagic.edit(Context(base), request)
    assert (found.cost.forward, found.cost.backward) == imagic.passes(base)["imagic"][:2]
    with pytest.raises(ImagicError, match=r"method ddim.* on .*a transformer"):
        next(iter(DDIMInversion().edit(Context(base), request)))
