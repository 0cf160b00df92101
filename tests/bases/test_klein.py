"""FLUX.2 klein: our Euler steps, loss, files and checks against diffusers itself."""

from __future__ import annotations

import json
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
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers import Flux2KleinPipeline as Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_keys import arguments, popped, said
from tiny import save_tiny, save_tiny_klein, save_tiny_sd3
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, Qwen2Tokenizer, Qwen3Config

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.export import export
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.layers import text_parameters
from imagic_lora.bases.loading.components import TEXT_ENCODERS
from imagic_lora.bases.loading.configs import architecture_at
from imagic_lora.bases.loading.flow_keys import KLEIN_KEYS
from imagic_lora.bases.loading.known import SHIPPED, BaseEntry
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.errors import ImagicError, ImagicWarning, Stopped
from imagic_lora.memory.plan import Assumed
from imagic_lora.photos.canvas import Canvas
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.flow import FlowSampler
from imagic_lora.training.configure import configure
from imagic_lora.training.fit import fit, result
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.rehearsing.rehearsal import rehearse

Fit = Callable[[Mode], Adapter]
TEXT = "a Cat {on} a mat!\n2"


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that is not distilled."""
    return save_tiny_klein(tmp_path_factory.mktemp("klein") / "base")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny distilled base of the same shapes."""
    return save_tiny_klein(tmp_path_factory.mktemp("twin") / "twin", seed=1, distilled=True)


@pytest.fixture(scope="module")
def plain(klein: Path) -> Pipeline:
    """The base, loaded by diffusers alone; tests do not change it."""
    pipe = Pipeline.from_pretrained(klein)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def fit_on(klein: Path, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Gives the adapter of a mode, fitted once; the LoRA alpha differs from the rank."""
    store = Store(tmp_path_factory.mktemp("fitted"))

    @cache
    def make(mode: Mode) -> Adapter:
        made = result(fit(photo_file, PROMPT, config_of(klein, mode), store, mode))
        assert made is not None
        return made

    return make


def config_of(folder: Path, mode: Mode = "lora", **changes: Any) -> Any:
    """Tiny settings at the smallest size, with layers that a transformer has."""
    tune = {"tune": {"targets": "attention+mlp"}} if mode == "lora" else {}
    return tiny_config(folder, mode, **({"resolution": 32} | tune | changes))


def canvas(height: int = 64, width: int = 48) -> Canvas:
    """A photo of that size."""
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return Canvas(torch.stack([down, across, (9 * across).sin()])[None], (0, 0, width, height), (width, height))


def sampled(base: Base, config: EditConfig, seeds: list[int], where: Canvas | None = None) -> Tensor:
    """The latents of our sampler."""
    one = base.encode_prompt(TEXT)
    return FlowSampler(base, config, where or canvas(), base.null()).latents([one] * len(seeds), seeds, [one] * len(seeds))


def theirs(pipe: Any, base: Any, seeds: list[int], steps: int, guidance: float, where: Canvas | None = None) -> Tensor:
    """The latents of diffusers' pipeline, normalised as the denoiser takes them."""
    height, width = (where or canvas()).pixels.shape[2:]
    found = pipe(
        prompt=[TEXT] * len(seeds), num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
    ).images  # fmt: skip
    return base.normalized(base._on_device("vae"), found)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-4."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# Against diffusers


@each(
    "steps, guidance, dynamic, side",
    [(1, 4.0, True, 64), (4, 4.0, True, 64), (2, 1.0, True, 96), (2, 4.0, False, 64)],
)
def test_our_steps_are_those_of_diffusers(tmp_path: Path, steps: int, guidance: float, dynamic: bool, side: int) -> None:
    """The same noise, steps and guidance give the same latents, to 1e-4, whatever shifts the levels."""
    folder = save_tiny_klein(tmp_path / "base", dynamic=dynamic, tied=dynamic)
    pipe: Any = Pipeline.from_pretrained(folder)
    base, where = opened(folder), canvas(side, 48)
    found = sampled(base, EditConfig(steps=steps, guidance_scale=guidance), [3, 4], where)
    close(found, theirs(pipe, base, [3, 4], steps, guidance, where))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_distilled_base_samples_without_guidance(twin: Path) -> None:
    """In the steps of its recipe; a guidance scale is refused where diffusers warns and ignores it."""
    base = opened(twin)
    assert (base.architecture.few_steps, base.architecture.guidance, base.null()) == (4, "none", None)
    found = sampled(base, EditConfig(steps=4, guidance_scale=0.0), [3])
    close(found, theirs(Pipeline.from_pretrained(twin), base, [3], 4, 1.0))


def test_the_levels_are_those_of_diffusers() -> None:
    """By size and number of steps, up to the largest images."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from imagic_lora.bases.families.klein import KleinFlow

    for steps, positions in ((50, 4096), (4, 4096), (28, 1024), (10, 4300), (10, 4301), (200, 16384)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=compute_empirical_mu(positions, steps))
        torch.testing.assert_close(KleinFlow(3.0, 1000, True).sigmas(steps, positions), scheduler.sigmas, atol=1e-6, rtol=0)


def test_the_conditioning_is_that_of_diffusers(klein: Path, plain: Any) -> None:
    """Three layers of Qwen3, of which only 27 are loaded; the template and the words are the words, the rest is padding."""
    base: Any = opened(klein)
    with torch.no_grad():
        close(base.encode_prompt(TEXT).tokens, plain.encode_prompt(TEXT)[0])
        close(base.null().tokens, plain.encode_prompt("")[0])
    assert len(base._helpers["text_encoder"].layers) == 27 < len(plain.text_encoder.model.layers)
    wanted = "<|im_start|>user\n" + TEXT + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert base.word_mask(TEXT)[0].tolist() == [place < len(plain.tokenizer(wanted).input_ids) for place in range(512)]
    assert "".join(TEXT[one.start : one.end] for one in base.tokenize(TEXT)) == TEXT


def test_the_end_of_a_long_prompt_is_cut_off_as_in_diffusers(klein: Path, plain: Any) -> None:
    """With a warning that holds what is lost."""
    long = 100 * "abcde " + "the end"
    base = opened(klein)
    with pytest.warns(ImagicWarning, match="longer than the .* tokens.*: 'cde abcde.*the end'"):
        found = base.encode_prompt(long).tokens
    with torch.no_grad():
        close(found, plain.encode_prompt(long)[0])


def test_latents_are_those_of_diffusers(klein: Path, plain: Any) -> None:
    """By the statistics of the batch norm; and decoding inverts the normalisation."""
    base, photo = opened(klein), canvas().pixels
    with torch.no_grad():
        close(base.encode_image(photo), plain._encode_vae_image(photo, None))
    expected = plain.vae.decode(plain.vae.encode(photo).latent_dist.mode()).sample
    close(base.decode(base.encode_image(photo)), expected)


def test_the_loss_is_that_of_diffusers_training_script(klein: Path) -> None:
    """In float64: noise at evenly spaced levels, packed latents, and the velocity from image to noise as the target."""
    base = opened(klein)
    base.denoiser.double()
    conditioning = base.encode_prompt(TEXT).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(n, 16, 4, 3, dtype=torch.float64, generator=generator) for n in (1, 4))
    times = torch.tensor([0.0, 0.1, 0.5, 0.999], dtype=torch.float64)
    with torch.no_grad():
        found = denoising_loss(base, clean, conditioning, noise, times)
        grid = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        at = [len(grid.timesteps) - 1 - int(u * 1000) for u in times.tolist()]  # the grid descends
        sigmas = grid.sigmas[at].double().view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * clean + sigmas * noise
        model: Any = base.denoiser
        predicted = model(
            hidden_states=Pipeline._pack_latents(noisy),
            timestep=grid.timesteps[at] / 1000,
            encoder_hidden_states=conditioning.tokens.expand(4, -1, -1),
            txt_ids=Pipeline._prepare_text_ids(conditioning.tokens),
            img_ids=(ids := Pipeline._prepare_latent_ids(noisy)),
        ).sample
        predicted = Pipeline._unpack_latents_with_ids(predicted, ids)
    expected = ((predicted - (noise - clean)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def flip(base: Any, patch: pytest.MonkeyPatch, what: str) -> None:
    """Makes a mistake that a family could make."""
    from imagic_lora.bases.families import klein as module

    right = base.denoise
    match what:
        case "sign":
            patch.setattr(base, "denoise", lambda *arguments: -right(*arguments))
        case "scale of time":
            patch.setattr(base, "denoise", lambda x_t, timesteps, conditioning: right(x_t, timesteps / 1000, conditioning))
        case "positions":
            places = module._positions
            patch.setattr(module, "_positions", lambda latents, time: places(latents, time)[:, [0, 2, 1, 3]])
        case "shift":
            patch.setattr(module, "_mu", lambda steps, positions: 0.0)
        case "order of layers":
            patch.setattr(module, "KLEIN_LAYERS", (27, 18, 9))
        case _:
            patch.setattr(module, "_MESSAGE", "{}")


@each("what", ["sign", "scale of time", "positions", "shift", "order of layers", "template"])
def test_a_wrong_convention_is_found(klein: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Each mistake, made on purpose, fails the comparison with diffusers above."""
    base = opened(klein)
    expected, config = theirs(plain, base, [3], 2, 1.0), EditConfig(steps=2, guidance_scale=1.0)
    close(sampled(base, config, [3]), expected)
    flip(base, monkeypatch, what)
    with pytest.raises(AssertionError):
        close(sampled(base, config, [3]), expected)


def test_the_target_is_what_the_steps_integrate(klein: Path) -> None:
    """A denoiser that predicts its target exactly leads from any noise to the photo; the opposite sign leads away."""
    base: Any = opened(klein)
    clean, sign = base.encode_image(canvas().pixels), 1

    def exact(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = timesteps.view(-1, 1, 1, 1)
        return sign * base.target(clean, (x_t - (1 - sigma) * clean) / sigma, timesteps)

    base.predict = exact
    close(sampled(base, EditConfig(steps=5, guidance_scale=1.0), [3]), clean)
    sign = -1
    assert (sampled(base, EditConfig(steps=5, guidance_scale=1.0), [3]) - clean).abs().max() > 1


def test_the_published_sizes_are_the_published_ones() -> None:
    """Of the transformers, and of Qwen3 without the layers that are not read."""
    found = {}
    for name in ("klein-base-4b", "klein-base-9b"):
        base = PUBLISHED[name]
        (text,) = base.text_encoders.values()
        with torch.device("meta"):
            transformer: Any = Flux2Transformer2DModel.from_config(base.denoiser)
            config_class, model_class = TEXT_ENCODERS["Qwen3ForCausalLM"]
            assert text_parameters(text, "Qwen3ForCausalLM") == model_class(config_class(**text)).num_parameters()
            AutoencoderKLFlux2.from_config(base.vae)
        whole = text_parameters(text | {"num_hidden_layers": 36}, "Qwen3ForCausalLM") / 1e9
        found[name] = (round(sum(one.numel() for one in transformer.parameters()) / 1e9, 3), round(whole, 2))
        assert base.vae_scale_factor * 64 == base.resolution == 1024
        assert (SHIPPED[name].twin, SHIPPED[SHIPPED[name].twin or ""].few_steps) == (name.replace("-base", ""), 4)
    assert found == {"klein-base-4b": (3.876, 4.02), "klein-base-9b": (9.079, 7.57)}


# Fit and edit


@pytest.mark.parametrize("mode", slow_but(["lora"], MODES))
def test_an_adapter_edits_from_every_start(klein: Path, fit_on: Fit, mode: Mode) -> None:
    """Pictures of the photo's size that depend on eta; the base is afterwards what it was."""
    adapter, base = fit_on(mode), opened(klein)
    before, editor = weights(base.denoiser), Editor(base)
    starts: list[tuple[Any, float]] = [("noise", 0.0), ("image", 0.0), ("inverted", 0.0), ("inverted", 1.0)]
    for start, ddim_eta in starts:
        config = EditConfig(steps=2, guidance_scale=3.0, start=start, ddim_eta=ddim_eta)
        pictures = [one.image for one in editor.edit(adapter, [0.0, 1.0], [0], config)]
        assert {picture.size for picture in pictures} == {read_canvas(adapter).size}
        assert (array(pictures[0]) != array(pictures[1])).any(), (start, ddim_eta)
    editor.close()
    assert same(weights(base.denoiser), before)


@pytest.mark.parametrize("mode", slow_but(["lora"], MODES))
def test_plain_diffusers_makes_the_same_picture(klein: Path, fit_on: Fit, mode: Mode) -> None:
    """To 1 of 255, from the adapter's files alone: LoRA by load_lora_weights, a whole transformer by from_pretrained.
    So does the pipeline of the editor."""
    adapter, config = fit_on(mode), EditConfig(steps=3, guidance_scale=3.0)
    editor = Editor(opened(klein))
    edited = array(next(editor.edit(adapter, [0.6], [5], config)).image)
    assert np.abs(edited - array(by_diffusers(Pipeline.from_pretrained(klein), adapter, 0.6, 5, config))).max() <= 1
    with editor.pipeline(adapter, 0.6, config) as edit:
        assert np.abs(edited - array(by_pipeline(edit, 5))).max() <= 1


@pytest.mark.parametrize("mode", slow_but(["lora"], ["lora", "full"]))
def test_a_stopped_fit_resumes_to_the_same_bytes(klein: Path, photo_file: Path, fit_on: Fit, tmp_path: Path, mode: Mode) -> None:
    """In the middle of stage 2."""
    store, seen = Store(tmp_path), iter([False] * 5)
    with pytest.raises(Stopped):
        result(fit(photo_file, PROMPT, config_of(klein, mode), store, "one", stop=lambda: next(seen, True)))
    resumed = result(fit(photo_file, PROMPT, config_of(klein, mode), store, "one", resume=True))
    assert resumed is not None
    for name in ("embeddings.safetensors", *resumed.record.weight_files):
        assert (resumed.folder / name).read_bytes() == (fit_on(mode).folder / name).read_bytes(), name


def test_words_alone_are_trained_and_stored(klein: Path, photo_file: Path, tmp_path: Path) -> None:
    """As the recipe of flows says: padding stays as it is, and the file holds the difference of the words."""
    config = config_of(klein, "embedding", embed={"tokens": "words", "relative": True})
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), "one"))
    assert adapter is not None
    stored, words = read_embeddings(adapter), opened(klein).word_mask(PROMPT)
    changed = (stored["target"].tokens != stored["optimised"].tokens).any(-1)
    assert torch.equal(changed, words)
    held = load_file(adapter.folder / "embeddings.safetensors")["optimised.difference"]
    assert (held.dtype, held.shape) == (torch.bfloat16, (1, int(words.sum()), 24))


def test_every_layer_has_a_lora_preset(klein: Path, fit_on: Fit, tmp_path: Path) -> None:
    """Preset all covers every linear layer, and a compressed adapter makes nearly the picture of the full one."""
    base = opened(klein)
    ends = tuple(f".{end}" for end in base.lora_targets("all"))
    layers = [name for name, module in base.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert [name for name in layers if not f".{name}".endswith(ends)] == []
    made = compress(fit_on("full"), base, 64, Store(tmp_path), "small")
    config = EditConfig(steps=2, guidance_scale=3.0)
    one, other = (next(Editor(opened(klein)).edit(adapter, [0.6], [5], config)).image for adapter in (fit_on("full"), made))
    assert np.abs(array(one) - array(other)).mean() < 3


def test_an_export_has_the_names_that_comfyui_reads(klein: Path, fit_on: Fit, tmp_path: Path) -> None:
    """``lora_transformer_`` and diffusers' name with underscores, derived here from the model; other layers of preset all it has not."""
    adapter = fit_on("lora")
    written = load_file(export(adapter, "kohya", tmp_path)[0])
    model: Any = Flux2Transformer2DModel.from_pretrained(klein / "transformer")
    blocks = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "transformer_blocks" in name]
    assert {name.partition(".")[0] for name in written} == {f"lora_transformer_{name.replace('.', '_')}" for name in blocks}
    assert "flux-2-klein" in Path(tmp_path, f"{adapter.name}.safetensors").read_bytes()[:4096].decode(errors="ignore")


def test_layers_that_comfyui_does_not_know_are_refused(klein: Path, photo_file: Path, tmp_path: Path) -> None:
    """They are refused by name; diffusers' format holds them."""
    config = config_of(klein, tune={"targets": "all"})
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), "one"))
    assert adapter is not None
    with pytest.raises(ImagicError, match=r"lora_transformer_double_stream_modulation_img_linear.*attention\+mlp"):
        export(adapter, "kohya", tmp_path)
    assert all(path.is_file() for path in export(adapter, "diffusers", tmp_path / "out"))


def test_the_fingerprint_is_of_the_weights(klein: Path, fit_on: Fit, tmp_path: Path) -> None:
    """Equal whatever the layers hold that are not read; another one for other weights, whose adapters are refused."""
    half = save_tiny_klein(tmp_path / "half", dtype=torch.bfloat16)
    other = save_tiny_klein(tmp_path / "other", seed=1)
    shutil.copytree(klein, tmp_path / "unread")
    file = tmp_path / "unread/text_encoder/model.safetensors"
    state = {name: value + (".27." in name or name == "model.norm.weight") for name, value in load_file(file).items()}
    assert any(".27." in name for name in state)
    save_file(state, file)
    assert opened(tmp_path / "unread").fingerprint == opened(klein).fingerprint
    assert opened(half).fingerprint != opened(other).fingerprint != opened(klein).fingerprint
    with pytest.raises(ImagicError, match="was made for base"):
        next(Editor(opened(other)).edit(fit_on("lora"), [0.5], [0], EditConfig(steps=2)))


def test_a_distilled_base_is_not_fitted(twin: Path, photo_file: Path, tmp_path: Path) -> None:
    """By its reason, before anything is loaded, and with a base that is open."""
    refused = pytest.raises(ImagicError, match=r"a fit on .*distilled to 4 steps.*undoes the distillation.*edit --twin")
    with refused:
        result(fit(photo_file, PROMPT, config_of(twin), Store(tmp_path), "one"))
    with refused:
        result(fit(photo_file, PROMPT, config_of(twin), Store(tmp_path), "one", base=opened(twin)))
    for base in (str(twin), "klein-4b"):
        with refused:
            configure({"base": base, "preset": "cpu"})


# What is said and not honoured is refused


def of_tokenizer() -> set[str]:
    made: list[Any] = [one.__init__ for one in Qwen2Tokenizer.__mro__ if "__init__" in vars(one) and one is not object]
    every = arguments(Qwen2Tokenizer.__init__) | popped(*made) | set(Qwen2Tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    return {name for name in every if not name.startswith("_")}  # these are not stored in files


def of_qwen3() -> set[str]:
    every = {one.name for one in fields(Qwen3Config)} | popped(PretrainedConfig.__post_init__, Qwen3Config.__post_init__)
    return every | set(GenerationConfig._get_default_generation_params())  # pyright: ignore[reportAttributeAccessIssue]


FILES = {
    part: f"{part}/{'scheduler_config' if part == 'scheduler' else 'tokenizer_config' if part == 'tokenizer' else 'config'}.json"
    for part in KLEIN_KEYS
} | {"model_index": "model_index.json"}
KNOWN: dict[str, Callable[[], set[str]]] = {
    "transformer": lambda: arguments(Flux2Transformer2DModel.__init__),
    "vae": lambda: arguments(AutoencoderKLFlux2.__init__),
    "text_encoder": of_qwen3,
    "tokenizer": of_tokenizer,
    "scheduler": lambda: arguments(FlowMatchEulerDiscreteScheduler.__init__),
    "model_index": lambda: arguments(Pipeline.__init__),
}


@each("part", list(KNOWN))
def test_every_key_is_in_one_list(part: str) -> None:
    """A key that a new version of diffusers or transformers adds fails here until somebody sorts it into KLEIN_KEYS."""
    keys, known = KLEIN_KEYS[part], KNOWN[part]()
    lists = [keys.honoured, keys.harmless, frozenset(keys.refused)]
    assert len(known) > 5
    assert known - frozenset().union(*lists) == set()
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


UNHEARD = [(FILES[part], name, "x") for part, keys in KLEIN_KEYS.items() for name in keys.refused]
UNHEARD += [(file, "a_setting_of_tomorrow", 0.5) for file in FILES.values()]


@pytest.mark.slow
@each("file, name, value", UNHEARD)
def test_a_setting_that_nothing_honours_is_refused_by_its_name(klein: Path, tmp_path: Path, file: str, name: str, value: Any) -> None:
    """With its file."""
    base = said(klein, tmp_path / "base", file, **{name: value})
    with pytest.raises(ImagicError, match=rf"{file} has {name} = .*, which is not supported"):
        opened(base) if file.startswith("tokenizer") else architecture_of(str(base))


@each(
    "file, values, message",
    [
        ("transformer/config.json", {"num_single_layers": 10**6}, "implausible settings: 'transformer.num_single_layers'"),
        ("transformer/config.json", {"joint_attention_dim": 32}, "in three layers and joint_attention_dim, 24 and 32"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4, 8]}, "axes_dims_rope and attention_head_dim, 20 and 16"),
        ("transformer/config.json", {"axes_dims_rope": [8, 8]}, "axes_dims_rope and of the coordinates of a position, 2 and 4"),
        ("transformer/config.json", {"axes_dims_rope": 16}, "lists of channel counts"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size of the transformer and that of packed latents, 2 and 1"),
        ("transformer/config.json", {"out_channels": 32}, "out_channels and in_channels of the transformer, 32 and 16"),
        ("transformer/config.json", {"mlp_ratio": "3"}, "'transformer.mlp_ratio'"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds = True, which is not supported"),
        ("vae/config.json", {"latent_channels": 8}, "in patches and in_channels of the transformer, 32 and 16"),
        ("vae/config.json", {"batch_norm_eps": 0}, "'vae.batch_norm_eps'"),
        ("vae/config.json", {"patch_size": [4, 4]}, r"patch_size of the VAE and that of latents, \[4, 4\] and \[2, 2\]"),
        ("text_encoder/config.json", {"num_hidden_layers": 26}, "26 layers. Expected: at least 27"),
        ("text_encoder/config.json", {"layer_types": ["sliding_attention"]}, "full_attention alone"),
        ("text_encoder/config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "the rope_type default"),
        ("text_encoder/config.json", {"rope_parameters": {"rope_theta": -1}}, "a rope_theta"),
        ("text_encoder/config.json", {"intermediate_size": 128}, "weights. Expected: the"),
        ("text_encoder/config.json", {"hidden_act": "os.system"}, "cannot be loaded"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "'scheduler.shift'"),
        ("model_index.json", {"is_distilled": "yes"}, "is_distilled = 'yes'"),
        ("model_index.json", {"text_encoder": ["evil", "Model"]}, "as text_encoder. Expected: Qwen3ForCausalLM"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "not known to be that of rectified flow"),
    ],
)
def test_a_hostile_config_is_refused(klein: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    """By name, on opening."""
    with pytest.raises(ImagicError, match=message):
        opened(said(klein, tmp_path / "base", file, **values))


@each("theta", [1000000, 1e6])
def test_older_configs_of_qwen3_are_read(klein: Path, tmp_path: Path, theta: float) -> None:
    """They state rope_theta by itself, and no layer types."""
    base = said(klein, tmp_path / "base", "text_encoder/config.json", rope_parameters=None, layer_types=None, rope_theta=theta)
    close(opened(base).encode_prompt(TEXT).tokens, opened(klein).encode_prompt(TEXT).tokens)


@each(
    "template, message",
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", r"has a chat template without <\|im_start\|>"),
        ("{% for i in range(10**9) %}{% endfor %}", "without"),
    ],
)
def test_another_chat_template_is_refused(klein: Path, tmp_path: Path, template: str | None, message: str) -> None:
    """It is a program, and is not run: the family writes what Qwen3's template does."""
    shutil.copytree(klein, tmp_path / "base")
    (tmp_path / "base/tokenizer/chat_template.jinja").unlink()
    if template:
        path = tmp_path / "base/tokenizer/tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(ImagicError, match=message):
        opened(tmp_path / "base")


def test_a_list_of_bases_says_that_a_flow_is_distilled(klein: Path, tmp_path: Path) -> None:
    """Of any family: it samples without guidance and is not fitted."""
    for folder in (klein, save_tiny_sd3(tmp_path / "sd3")):
        found = architecture_at(folder, BaseEntry(source=str(folder), few_steps=3, resolution=32, prediction="flow"))
        assert (found.few_steps, found.guidance, found.resolution) == (3, "none", 32)
        with pytest.raises(ImagicError, match="distilled to 3 steps"):
            found.check_trainable("one")


@pytest.mark.slow
def test_its_memory_is_predicted_by_a_rehearsal(klein: Path, fit_on: Fit) -> None:
    """Weights and LoRA layers as they are, the text encoder without the layers that are not read."""
    architecture, base = architecture_of(str(klein)), opened(klein)
    run, assumed = config_of(klein), Assumed("cpu", "fp32", "adam")
    plan = rehearse(architecture, run, assumed)
    assert list(plan.stages) == ["encode", "embed", "tune", "sample", "decode"]
    stored = load_file(fit_on("lora").folder / "pytorch_lora_weights.safetensors")
    assert plan.stages["tune"].gradients == sum(value.numel() * 4 for value in stored.values())
    modules = [base.denoiser, *base._helpers.values()]  # pyright: ignore[reportAttributeAccessIssue]
    held = sum(one.nbytes for module in modules for one in (*module.parameters(), *module.buffers()))
    assert plan.stages["encode"].weights == pytest.approx(held, rel=0.01)


# The photo as a reference


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_reference_is_that_of_diffusers(klein: Path, plain: Any, guidance: float) -> None:
    """The image of an instruction edit: clean tokens beside the noisy ones, with and without guidance; two images of a batch."""
    base, photo = opened(klein), Image.radial_gradient("L").resize((80, 64)).convert("RGB")
    where = Canvas(torch.tensor(array(photo)).permute(2, 0, 1)[None] / 127.5 - 1, (0, 0, 80, 64), (80, 64))
    expected = plain(
        image=photo, prompt=TEXT, num_inference_steps=2, guidance_scale=guidance, height=64, width=80,
        generator=torch.Generator().manual_seed(4), output_type="latent",
    ).images  # fmt: skip
    config = EditConfig(steps=2, guidance_scale=guidance, reference=True)
    found = sampled(base, config, [3, 4], where)
    close(found[1:], base.normalized(base._on_device("vae"), expected))  # pyright: ignore[reportAttributeAccessIssue]
    without = sampled(base, config.model_copy(update={"reference": False}), [3, 4], where)
    assert (found - without).abs().max() > 1e-3


@each("start", ["noise", "flow", "inverted"])
def test_an_adapter_edits_with_the_photo_as_reference(klein: Path, twin: Path, fit_on: Fit, start: Any) -> None:
    """From every start, and on the twin; the reference changes the picture, and start flow still gives the photo at eta 0."""
    adapter, config = fit_on("lora"), EditConfig(steps=2, guidance_scale=2.0, start=start, reference=True)
    plain_config = config.model_copy(update={"reference": False})
    editor = Editor(opened(klein))
    pictures = {one.eta: array(one.image) for one in editor.edit(adapter, [0.0, 1.0], [0], config)}
    others = {one.eta: array(one.image) for one in editor.edit(adapter, [0.0, 1.0], [0], plain_config)}
    assert (pictures[1.0] != others[1.0]).any()
    assert (pictures[0.0] == others[0.0]).all() == (start == "flow")
    distilled = config.model_copy(update={"guidance_scale": 0.0})
    assert next(Editor(opened(twin), force=True).edit(adapter, [0.5], [0], distilled)).image.size == read_canvas(adapter).size


def test_a_base_without_references_refuses_one(photo_file: Path, tmp_path: Path) -> None:
    """By name, before anything is sampled; a plan counts what a reference takes."""
    place = save_tiny_sd3(tmp_path / "sd3")
    adapter = result(fit(photo_file, PROMPT, config_of(place), Store(tmp_path / "store"), "one"))
    assert adapter is not None
    with pytest.raises(ImagicError, match=r"--reference on .*sd3. Expected: a base whose denoiser takes a reference image"):
        next(Editor(opened(place)).edit(adapter, [0.5], [0], EditConfig(steps=2, reference=True)))


@pytest.mark.slow
def test_a_plan_counts_the_reference(klein: Path) -> None:
    """Twice the tokens of the image."""
    architecture, assumed = architecture_of(str(klein)), Assumed("cpu", "fp32", "adam")
    both = [rehearse(architecture, config_of(klein, edit={"reference": on}, resolution=128), assumed) for on in (False, True)]
    assert both[0].stages["sample"].activations < both[1].stages["sample"].activations
    assert both[0].stages["tune"] == both[1].stages["tune"]


# Memory


@pytest.mark.slow
@each("family, idle", [("klein", "keep"), ("klein", "release"), ("sd3", "release")])
def test_a_large_text_encoder_is_quantized(klein: Path, tmp_path: Path, family: str, idle: Any) -> None:
    """Its linear layers, on every loading; the embedding is nearly the same, and a plan counts the smaller weights."""
    folder = klein if family == "klein" else save_tiny_sd3(tmp_path / "sd3", wide=True)
    name = "text_encoder" if family == "klein" else "text_encoder_3"
    whole, small = opened(folder).encode_prompt(TEXT).tokens, opened(folder, idle=idle, quantize_text="nf4")
    found: Any = small.encode_prompt(TEXT).tokens
    assert 0 < (found - whole).abs().mean() < 0.3 * whole.std()
    small.offload_encoders()
    assert torch.equal(small.encode_prompt(TEXT).tokens, found)
    kinds = [type(one).__name__ for one in small._helpers[name].modules()]  # pyright: ignore[reportAttributeAccessIssue]
    assert "Linear4bit" in kinds
    run = config_of(folder, memory={"idle": idle, "quantize_text": "nf4"})
    plans = [rehearse(architecture_of(str(folder)), one, Assumed("cpu", "fp32", "adam")) for one in (config_of(folder), run)]
    assert plans[1].stages["encode"].weights < plans[0].stages["encode"].weights


def test_clip_is_not_quantized(tmp_path: Path) -> None:
    """The lever would do nothing."""
    with pytest.raises(ImagicError, match=r"--quantize-text nf4 with .*whose text encoder is CLIP"):
        opened(save_tiny(tmp_path / "sd"), quantize_text="nf4")
