"""Bases: what they answer is what diffusers, or the equation, answers."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import KINDS, each, opened, same, weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor

from imagic_lora.bases.loading import registry
from imagic_lora.bases.loading.files import Folder, cast_finite, fingerprint
from imagic_lora.bases.loading.registry import architecture_of, locate
from imagic_lora.bases.loading.vetting import read_json
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime

STEPS = torch.tensor([0, 1, 250, 999])


def samples(count: int = 4) -> tuple[Tensor, Tensor]:
    """Clean latents and noise."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 4, 8, 8, generator=generator)


def alpha_sigma() -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t) in float64, from the betas that tiny.py declares."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[STEPS].reshape(4, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


@pytest.fixture(scope="module")
def declared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same base with different schedulers declared."""
    root = tmp_path_factory.mktemp("declared")
    return {"ddim": folder} | {kind: save_tiny(root / kind, scheduler=kind) for kind in ("euler", "pndm")}


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm"])
def test_noised_is_the_closed_form_whatever_scheduler_is_declared(declared: dict[str, Path], scheduler: str) -> None:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, in float64."""
    clean, noise = samples()
    alpha, sigma = alpha_sigma()
    expected = alpha * clean.double() + sigma * noise.double()
    torch.testing.assert_close(opened(declared[scheduler]).noised(clean, noise, STEPS).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", ["euler", "pndm"])
def test_training_leaves_the_declared_scheduler_to_the_sampler(declared: dict[str, Path], scheduler: str) -> None:
    """A DDPM scheduler trains; the pipelines still have the declared one."""
    base = opened(declared[scheduler])
    assert type(base.training_scheduler) is DDPMScheduler
    sampling = base.pipeline("text2image").scheduler
    assert (
        sampling.config["_class_name"] == json.loads((declared[scheduler] / "scheduler/scheduler_config.json").read_text())["_class_name"]
    )
    assert scheduler in type(sampling).__name__.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_target_is_the_closed_form(folders: dict[str, Path], kind: str) -> None:
    """The noise itself, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0, in float64."""
    clean, noise = samples()
    alpha, sigma = alpha_sigma()
    expected = noise.double() if kind == "epsilon" else alpha * noise.double() - sigma * clean.double()
    torch.testing.assert_close(opened(folders[kind]).target(clean, noise, STEPS).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_noised_and_target_are_those_of_diffusers(folders: dict[str, Path], kind: str) -> None:
    """Bit-equal to the DDIM scheduler that the folder declares."""
    clean, noise = samples()
    base = opened(folders[kind])
    reference: Any = DDIMScheduler.from_pretrained(folders[kind] / "scheduler")
    assert torch.equal(base.noised(clean, noise, STEPS), reference.add_noise(clean, noise, STEPS))
    expected = noise if kind == "epsilon" else reference.get_velocity(clean, noise, STEPS)
    assert torch.equal(base.target(clean, noise, STEPS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_type_is_that_of_the_config(folders: dict[str, Path], kind: str) -> None:
    """Read from the scheduler's own file."""
    assert opened(folders[kind]).prediction_type == kind


def test_timesteps_cover_the_schedule(folder: Path) -> None:
    """Times in [0, 1) become whole timesteps from the first to the last."""
    times = torch.tensor([0, 0.0009, 0.001, 0.5, 1 - 1e-9], dtype=torch.float64)
    assert opened(folder).timesteps(times).tolist() == [0, 0, 1, 500, 999]


def test_timesteps_follow_the_config(folder: Path) -> None:
    """A schedule of 50 steps is not trained at step 51."""
    base = opened(folder)
    base.training_scheduler.register_to_config(num_train_timesteps=50)
    assert base.timesteps(torch.tensor([0.5, 0.999])).tolist() == [25, 49]


def test_predict_is_the_unet_and_broadcasts(folder: Path) -> None:
    """A conditioning of one serves the whole batch, as if it were repeated."""
    base, (x_t, _) = opened(folder), samples()
    text = base.encode_prompt("a cat")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert torch.equal(base.predict(x_t, STEPS, text), unet(x_t, STEPS, text.tokens.repeat(4, 1, 1)).sample)


@pytest.mark.parametrize("prompt", ["a cat", "", "a b c d e f g h i j k l m n"])
def test_encode_text_is_that_of_diffusers(folder: Path, prompt: str) -> None:
    """Bit-equal to the pipeline's encode_prompt, to the longest prompt that fits."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(opened(folder).encode_prompt(prompt).tokens, expected)


def test_a_long_prompt_says_what_it_lost(folder: Path) -> None:
    """Of 20 words of one token 14 fit; the rest is named, and the embedding is that of diffusers."""
    words = "abcdefghijklmnopqrst"
    with pytest.warns(UserWarning, match="14 tokens.*the end is cut off: 'o p q r s t ?'"):
        tokens = opened(folder).encode_prompt(" ".join(words)).tokens
    assert torch.equal(tokens, opened(folder).encode_prompt(" ".join(words[:14])).tokens)


def test_null_is_the_negative_prompt_of_diffusers(folder: Path) -> None:
    """What guidance pushes away from where no negative prompt is given."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    _, negative = pipe.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=True)
    null = opened(folder).null()
    assert null is not None
    assert torch.equal(null.tokens, negative)


def test_images_are_encoded_with_the_scale_of_the_config(folder: Path) -> None:
    """Latents are the posterior's mode times the config's factor, which here is 0.5."""
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mode() * 0.5
        decoded = vae.decode(expected / 0.5).sample
    base = opened(folder)
    assert torch.equal(base.encode_image(image), expected)
    assert torch.equal(base.decode(expected), decoded)


@pytest.mark.parametrize("idle", ["keep", "release"])
def test_offloaded_components_come_back_when_they_are_used(folder: Path, idle: str) -> None:
    """A kept module stays the same. A released one is freed and read again: frozen, with its memory levers, with bit-equal outputs."""
    base = opened(folder, idle=idle, vae_slicing=True)
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    helpers = [weakref.ref(module) for module in (base.pipeline("text2image").vae, base._helpers["text_encoder"])]
    latents, text = base.encode_image(image), base.encode_prompt("a cat").tokens
    picture = base.decode(latents)
    base.offload_encoders()
    gc.collect()
    assert [helper() is None for helper in helpers] == [idle == "release"] * 2
    assert torch.equal(base.decode(latents), picture)
    assert torch.equal(base.encode_image(image), latents)
    assert torch.equal(base.encode_prompt("a cat").tokens, text)
    pipe = base.pipeline("text2image")
    assert pipe.vae.use_slicing
    assert not any(p.requires_grad for module in (pipe.vae, base._helpers["text_encoder"]) for p in module.parameters())


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("lever", ["tiling", "slicing"])
def test_levers_of_the_vae_reach_it(folder: Path, lever: str, switch: bool) -> None:
    """Each by itself, and off where it is not asked for."""
    vae = opened(folder, **{f"vae_{lever}": switch}).pipeline("text2image").vae
    assert {name: getattr(vae, f"use_{name}") for name in ("tiling", "slicing")} == {"tiling": False, "slicing": False} | {lever: switch}


@pytest.mark.parametrize(
    ("mode", "memory", "denoiser", "rest"),
    [
        ("lora", {"dtype": "fp32"}, torch.float32, torch.float32),
        ("lora", {"dtype": "bf16"}, torch.bfloat16, torch.bfloat16),
        ("full", {"dtype": "bf16"}, torch.float32, torch.bfloat16),
        ("full", {"dtype": "bf16", "master_weights": "bf16-stochastic"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_denoiser_has_the_precision_of_what_is_trained(
    folder: Path, mode: Any, memory: dict[str, Any], denoiser: torch.dtype, rest: torch.dtype
) -> None:
    """That of the master weights in full, that of the arithmetic where it stays frozen; the rest follows the arithmetic."""
    base: Any = opened(folder, mode, **memory)
    pipe = base.pipeline("text2image")
    assert [module.dtype for module in (pipe.unet, pipe.vae, base._helpers["text_encoder"])] == [denoiser, rest, rest]


def test_the_architecture_is_the_same_before_and_after_loading(folder: Path) -> None:
    """What a plan is made of, read from the folder's configs or from the components in memory."""
    loaded, read = opened(folder).architecture, architecture_of(str(folder))
    assert (loaded.resolution, loaded.vae_scale_factor) == (read.resolution, read.vae_scale_factor) == (32, 4)
    assert list(loaded.text_encoders) == list(read.text_encoders) == ["text_encoder"]
    for one, other in ((loaded.denoiser, read.denoiser), (loaded.vae, read.vae), (loaded.scheduler, read.scheduler)):
        ours = json.loads(json.dumps(one, default=str))
        theirs = {name: value for name, value in other.items() if not name.startswith("_") and name in ours}
        assert len(theirs) > 5
        assert {name: ours[name] for name in theirs} == theirs


@each("name", ["no-such-base", "/no/such"])
def test_an_unknown_base_has_no_architecture(name: str) -> None:
    """It is refused as it would be on opening."""
    with pytest.raises(ImagicError, match=r"no base called|no file or folder /no/such"):
        architecture_of(name)


def test_a_base_is_frozen(folder: Path) -> None:
    """Nothing of it asks for gradients, nothing is in training mode."""
    base: Any = opened(folder)
    pipe = base.pipeline("text2image")
    for module in (pipe.unet, pipe.vae, base._helpers["text_encoder"]):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("kind", "expected"), [("text2image", StableDiffusionPipeline), ("image2image", StableDiffusionImg2ImgPipeline)])
def test_pipelines_share_the_denoiser_and_nothing_of_the_last_run(folder: Path, kind, expected: type) -> None:
    """Of the kind asked for, over the module in memory, each with a scheduler of its own."""
    base = opened(folder)
    one, other = base.pipeline(kind), base.pipeline(kind)
    assert type(one) is expected
    assert one.unet is base.denoiser
    assert one.scheduler is not other.scheduler


def test_sizes_are_those_of_the_config(folder: Path) -> None:
    """8 latents of 4 pixels are 32; diffusers' pipelines want multiples of 8."""
    base = opened(folder)
    assert (base.resolution, base.size_multiple) == (32, 8)


def test_an_fp16_variant_loads_and_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    """The same weights in half precision: rounded values, equal fingerprint."""
    half = opened(save_tiny(tmp_path, dtype=torch.float16, variant="fp16"))
    full = opened(folder)
    assert half.fingerprint == full.fingerprint
    assert same(weights(half.denoiser), {name: value.half().float() for name, value in weights(full.denoiser).items()})


def test_other_weights_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    """The same architecture from another seed is another base."""
    assert opened(save_tiny(tmp_path, seed=1)).fingerprint != opened(folder).fingerprint


@each("name", ["no-such-base", "./no/such/folder", "/no/such", "a/b/c", "models/mine.safetensors", "models/mine.CKPT"])
def test_an_unknown_base_is_refused(name: str) -> None:
    """A name that is neither known nor a folder nor shaped like a hub id is never looked for on the network."""
    with pytest.raises(ImagicError, match="no file or folder" if "/" in name else "no base called"):
        locate(name)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    """It must hold model_index.json."""
    with pytest.raises(ImagicError, match=r"no model_index\.json"):
        opened(tmp_path)


@each("index, message", [('{"_class_name": "FluxPipeline"}', "FluxPipeline"), ("{", "cannot be read"), ("[]", "cannot be read")])
def test_an_unsupported_family_is_refused(tmp_path: Path, index: str, message: str) -> None:
    """Named by its class; an index that is no index is refused as such."""
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ImagicError, match=message):
        opened(tmp_path)


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    """A component that lost its file is the user's to mend."""
    save_tiny(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ImagicError, match="unet holds no weights"):
        opened(tmp_path)


def test_an_unknown_prediction_type_is_refused(folder: Path, tmp_path: Path) -> None:
    """Rather than trained as something else."""
    shutil.copytree(folder, tmp_path / "base")
    path = tmp_path / "base/scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"flow"'))
    with pytest.raises(ImagicError, match="predicts 'flow'"):
        opened(tmp_path / "base")


def test_broken_weights_are_named(folder: Path, tmp_path: Path) -> None:
    """A truncated file, or the pointer that git leaves of a large one, is no traceback."""
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").write_text("version https://git-lfs")
    for open_it in (lambda: opened(tmp_path / "base"), lambda: fingerprint(Folder(tmp_path / "base"), ("unet",), "epsilon")):
        with pytest.raises(ImagicError):
            open_it()


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    """It would be ignored."""
    with pytest.raises(ImagicError, match=r"revision main for the local path /.*a revision only for a hub id"):
        locate(str(folder), "main")


def test_a_base_remembers_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is kept whole, so that its adapters work from anywhere."""
    monkeypatch.chdir(folder.parent)
    assert opened(Path(folder.name)).name == str(folder.resolve())


def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of a base, to change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the base, to change."""
    return copied(folder, tmp_path)


def said(copy: Path, file: str, **values: Any) -> Path:
    """The base, with other values in one of its JSON files."""
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


def held(copy: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The base, with other weights in one of its files."""
    found = load_file(copy / file)
    change(found)
    save_file(found, copy / file)
    return copy


UNET, VAE, TEXT = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@each("text, why", [
        ("[]", "a list, not an object"),
        ('{"a": ', "Expecting value"),
        ('{"a": 1, "a": 1}', "a duplicate key"),
        ('{"a": NaN}', "the number NaN is not finite"),
        ('{"a": [-Infinity]}', "the number -Infinity is not finite"),
        ('{"a": 1e999}', "the number 1e999 is not finite"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"a": [' + "[]," * 270_000 + "1]}", "270,002 lists and objects, more than 262,144"),
        ('{"a": "' + "x" * 2**20 + '"}', "over 1,048,576 bytes"),
        ("\udc80", "can't decode byte 0x80"),
    ])  # fmt: skip
def test_json_is_read_strictly(tmp_path: Path, text: str, why: str) -> None:
    """As diffusers writes it, and of a size that a config may have."""
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ImagicError, match=f"config.json cannot be read .*{why}"):
        read_json(tmp_path / "config.json")


@each("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)])
def test_json_is_a_file(tmp_path: Path, make) -> None:
    """Nothing that never ends, or waits."""
    make(tmp_path / "config.json")
    with pytest.raises(ImagicError, match="not a file"):
        read_json(tmp_path / "config.json")


def test_a_base_may_be_links(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the hub, where every file is a link to a file elsewhere."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        link = tmp_path / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert opened(tmp_path).fingerprint == opened(folder).fingerprint


@each("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@each("named", [["own", "X"], ["os", "system"], ["diffusers", 1], ["diffusers"], [None, None], "x", None])
def test_a_component_has_the_class_that_is_supported(tmp_path: Path, folder: Path, part: str, named: object) -> None:
    """Whatever else the index names is not looked for."""
    copy = copied(folder, tmp_path)
    said(copy, "model_index.json", **{part: named})
    for open_it in (opened, lambda path: architecture_of(str(path))):
        with pytest.raises(ImagicError, match=rf"model_index.json has .* as {part}"):
            open_it(copy)


@each("name", ["FlowMatchSchedulerOfNobody", "utils", "SchedulerMixin", "AutoencoderKL"])
def test_a_scheduler_is_one_of_diffusers(tmp_path: Path, folder: Path, name: str) -> None:
    """A class that diffusers has among its schedulers, and that makes one."""
    copy = copied(folder, tmp_path)
    with pytest.raises(ImagicError, match=r"scheduler"):
        opened(said(copy, "model_index.json", scheduler=["diffusers", name]))


@each("family", [["own", "X"], None, 3, {}, "os"])
def test_a_family_is_a_name(tmp_path: Path, folder: Path, family: object) -> None:
    """diffusers would look for code where it is a list."""
    copy = copied(folder, tmp_path)
    with pytest.raises(ImagicError, match="one of StableDiffusionPipeline"):
        opened(said(copy, "model_index.json", _class_name=family))


def test_an_unknown_component_is_refused(copy: Path) -> None:
    """It would be left out."""
    with pytest.raises(ImagicError, match="has a component 'controlnet'"):
        opened(said(copy, "model_index.json", controlnet=["diffusers", "ControlNetModel"]))


def test_the_published_index_is_read(copy: Path, folder: Path) -> None:
    """It names a safety checker and a feature extractor. Neither is loaded, and the code in their folders is not imported."""
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/stable_diffusion.py").write_text("raise SystemExit")
    said(
        copy, "model_index.json", _diffusers_version="0.6.0", requires_safety_checker=True, image_encoder=[None, None],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], feature_extractor=["transformers", "CLIPImageProcessor"],
    )  # fmt: skip
    assert opened(copy).fingerprint == opened(folder).fingerprint


@each(
    "file, name, value",
    [
        ("unet", "block_out_channels", [10**9, 10**9]),
        ("unet", "layers_per_block", 10**6),
        ("unet", "layers_per_block", True),
        ("unet", "sample_size", [8, 8]),
        ("unet", "attention_head_dim", -1),
        ("unet", "norm_eps", "x"),
        ("vae", "latent_channels", "4"),
        ("vae", "scaling_factor", 0),
        ("text_encoder", "hidden_size", 0),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "vocab_size", 10**30),
        ("text_encoder", "eos_token_id", [1]),
        ("scheduler", "num_train_timesteps", 10**12),
    ],
)
def test_sizes_are_plausible(tmp_path: Path, folder: Path, file: str, name: str, value: object) -> None:
    """Before anything of that size is made, or planned."""
    copy = copied(folder, tmp_path)
    said(copy, f"{file}/{'scheduler_config' if file == 'scheduler' else 'config'}.json", **{name: value})
    for open_it in (opened, lambda path: architecture_of(str(path))):
        with pytest.raises(ImagicError, match=rf"has implausible settings: '{file}\.{name}'"):
            open_it(copy)


@each("part, name", [("vae", "latent_channels"), ("unet", "cross_attention_dim"), ("text_encoder", "hidden_size")])
@each("left_out", [True, False])
def test_a_size_that_no_config_states_is_named_with_its_file(tmp_path: Path, folder: Path, part: str, name: str, left_out: bool) -> None:
    """Left out, or null; with what to do, in the plan and when it is opened."""
    path = copied(folder, tmp_path) / part / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != name}
    path.write_text(json.dumps(config if left_out else config | {name: None}))
    for open_it in (opened, lambda folder: architecture_of(str(folder))):
        with pytest.raises(ImagicError, match=rf"does not state sizes of the model \({part}/config\.json: {name}\)") as caught:
            open_it(path.parents[1])
        assert "add them to these files" in caught.value.remedy


@each("file, values, why", [
        ("unet", {"in_channels": 7}, "in_channels"),
        ("unet", {"cross_attention_dim": 24}, "hidden_size of the text encoders and cross_attention_dim, 16 and 24"),
        ("unet", {"down_block_types": ["DownBlock2D"]}, "numbers of down_block_types and block_out_channels, 1 and 2"),
        ("unet", {"up_block_types": [1, 2]}, r"the blocks \[1, 2\]"),
        ("unet", {"addition_embed_type": "text"}, "a U-Net with the addition_embed_type 'text'"),
        ("unet", {"block_out_channels": [8, 24]}, r"tensors of .*unet have another shape than in its config"),
        ("unet", {"block_out_channels": [2**20, 2**20]}, r"tensors of .*unet are not in its config"),
        ("unet", {"layers_per_block": 2}, r"tensors of .*unet are missing"),
        ("unet", {"act_fn": "os.system"}, "unet cannot be loaded"),
        ("unet", {"norm_num_groups": 3}, "unet cannot be loaded"),
        ("vae", {"latent_channels": 8}, "latent_channels of the VAE and in_channels of the U-Net, 8 and 4"),
        ("vae", {"mid_block_add_attention": False}, r"tensors of .*vae are not in its config"),
        ("text_encoder", {"num_hidden_layers": 3}, r"text_encoder holds .* weights.*that its config describes"),
        ("text_encoder", {"hidden_act": "system"}, "text_encoder cannot be loaded"),
    ])  # fmt: skip
def test_parts_fit_each_other_and_their_weights(tmp_path: Path, folder: Path, file: str, values: dict[str, Any], why: str) -> None:
    """Rather than being cut, or filled up at random."""
    copy = copied(folder, tmp_path)
    with pytest.raises(ImagicError, match=why):
        opened(said(copy, f"{file}/config.json", **values))


@each(
    "values, why",
    [
        ({"beta_schedule": "x"}, "scheduler cannot be loaded"),
        ({"timestep_spacing": "x"}, "scheduler cannot be loaded"),
        ({"beta_schedule": "linear", "beta_start": -1}, "betas that give no valid noise schedule"),
        ({"trained_betas": [0.1, 0.2]}, "betas that give no valid noise schedule"),
    ],
)
def test_a_scheduler_makes_a_schedule(tmp_path: Path, folder: Path, values: dict[str, Any], why: str) -> None:
    """Before the training, not after it."""
    copy = copied(folder, tmp_path)
    with pytest.raises(ImagicError, match=why):
        opened(said(copy, "scheduler/scheduler_config.json", **values))


@each("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler", "RePaintScheduler"])
def test_a_sampler_of_another_noise_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    """Its base was made with noise that training here would not give it."""
    copy = copied(folder, tmp_path)
    index = json.loads((copy / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name, "prediction_type": "epsilon"}))
    with pytest.raises(ImagicError, match=f"{name}', whose noise process is not known to be that of DDPM"):
        opened(copy)


def test_an_adapter_is_no_base(fitted: Callable[..., Any]) -> None:
    """With what to do with it."""
    with pytest.raises(ImagicError, match=r"is an adapter.*imagic-lora edit"):
        locate(str(fitted("lora").folder))


def test_the_same_weights_that_predict_another_thing_are_another_base(folder: Path, tmp_path: Path) -> None:
    """An adapter of one would generate noise on the other."""
    shutil.copytree(folder, tmp_path / "base")
    before = opened(tmp_path / "base").fingerprint
    assert opened(said(tmp_path / "base", "scheduler/scheduler_config.json", prediction_type="v_prediction")).fingerprint != before


@each("file, name", [(UNET, "conv_in.weight"), (VAE, "encoder.conv_in.bias"), (TEXT, "final_layer_norm.bias")])
@each(
    "spoil, why",
    [
        (lambda found, name: found.pop(name), "are missing, for example '{name}'|holds .* weights"),
        (lambda found, name: found.update(more=torch.ones(1)), "are not in its config, for example 'more'|holds .* weights"),
        (lambda found, name: found.update({name: found[name].reshape(-1, 1, 2)}), "have another shape .*'{name}'|cannot be loaded"),
        (lambda found, name: found.update({name: found[name].char()}), "holds '{name}' as I8.*F32, F16, BF16.*not quantized"),
        (lambda found, name: found[name].view(-1)[-1:].fill_(torch.nan), "'{name}' in .* holds NaN or infinity in float32"),
        (lambda found, name: found[name].view(-1)[:1].fill_(-torch.inf), "'{name}' in .* holds NaN or infinity in float32"),
    ],
)
def test_weights_are_those_of_the_config_and_finite(tmp_path: Path, folder: Path, file: str, name: str, spoil, why: str) -> None:
    """Every tensor that it asks for and no other, of its shape, in a precision for weights."""
    copy = copied(folder, tmp_path)
    held(copy, file, lambda found: spoil(found, name))
    with pytest.raises(ImagicError, match=why.replace("{name}", name)):
        opened(copy)


@each("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_every_floating_point_type_are_read(tmp_path: Path, folder: Path, dtype: torch.dtype) -> None:
    """As diffusers and ComfyUI do; the fingerprint is that of the values."""
    copy = copied(folder, tmp_path)
    for file in (UNET, VAE, TEXT):
        held(copy, file, lambda found: found.update({name: value.to(dtype) for name, value in found.items()}))
    base, whole = opened(copy), opened(folder)
    assert same(weights(base.denoiser), {name: value.to(dtype).float() for name, value in weights(whole.denoiser).items()})
    assert (base.fingerprint == whole.fingerprint) == (dtype == torch.float64)


def test_the_other_half_of_clip_is_left_out(copy: Path, folder: Path) -> None:
    """A text encoder that was saved with its projection, or with the encoder of images; the fingerprint is that without."""
    extras = {"text_projection.weight": torch.eye(16), "logit_scale": torch.ones(()), "vision_model.post_layernorm.bias": torch.ones(4)}
    base = opened(held(copy, TEXT, lambda found: found.update(extras)))
    assert base.fingerprint == opened(folder).fingerprint
    assert torch.equal(base.encode_prompt("a cat").tokens, opened(folder).encode_prompt("a cat").tokens)


def test_weights_that_a_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    """65504 is the largest number of fp16."""
    weights = {"a": torch.tensor([65504.0]), "b": torch.tensor([1e5]), "empty": torch.empty(0)}
    assert torch.equal(cast_finite(weights, torch.bfloat16, tmp_path)["b"], torch.tensor([1e5], dtype=torch.bfloat16))
    with pytest.raises(ImagicError, match=r"'b' in .* holds NaN or infinity in float16"):
        cast_finite(weights, torch.float16, tmp_path)


@each(
    "spoil, why",
    [
        (lambda content: content[:-1], "is not a whole safetensors file"),
        (lambda content: content + b"\0", "is not a whole safetensors file"),
        (lambda content: (2**63).to_bytes(8, "little") + content[8:], "a header of 9,223,372,036,854,775,808 bytes"),
        (lambda content: b"", "is not a whole safetensors file"),
    ],
)
def test_a_file_of_weights_is_whole(tmp_path: Path, folder: Path, spoil: Callable[[bytes], bytes], why: str) -> None:
    """And its header is none to fill the memory with."""
    copy = copied(folder, tmp_path)
    (copy / UNET).write_bytes(spoil((copy / UNET).read_bytes()))
    with pytest.raises(ImagicError, match=why):
        opened(copy)


def sharded(copy: Path, file: str) -> list[Path]:
    """A file of weights in two, as diffusers names them."""
    found, stem = sorted(load_file(copy / file).items()), file.removesuffix(".safetensors")
    (copy / file).unlink()
    shards = [copy / f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for k, shard in enumerate(shards):
        save_file(dict(found[k::2]), shard)
    return shards


@each("file", [UNET, VAE, TEXT])
def test_shards_are_found_by_their_names(tmp_path: Path, folder: Path, file: str) -> None:
    """Bit-equal to the whole; their index, which may name any file there is, is not read."""
    copy = copied(folder, tmp_path)
    sharded(copy, file)
    (copy / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "../../../../etc/passwd"}}))
    one, whole = opened(copy), opened(folder)
    assert one.fingerprint == whole.fingerprint
    for part in ("_denoiser", "_helpers"):
        ours, theirs = getattr(one, part), getattr(whole, part)
        for name in ("vae", "text_encoder") if part == "_helpers" else ("",):
            assert same(weights(ours[name] if name else ours), weights(theirs[name] if name else theirs))


def test_shards_are_all_there_and_once(copy: Path) -> None:
    """Neither fewer nor more than they say."""
    first, _ = sharded(copy, UNET)
    again = shutil.copy(first, first.with_name(first.name.replace("of-00002", "of-00003")))
    with pytest.raises(ImagicError, match="and so does another file of the folder"):
        opened(copy)
    Path(again).unlink()
    first.unlink()
    with pytest.raises(ImagicError, match="are missing"):
        opened(copy)


def test_names_of_early_days_are_read(copy: Path, folder: Path) -> None:
    """The VAE and the text encoder of Stable Diffusion 1.5 have them; diffusers itself reads the same out of them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if ".attentions.0." in name and "norm" not in name]:
            found["{}.attentions.0.{}.{}".format(*rename(name))] = found.pop(name)

    def rename(name: str) -> tuple[str, str, str]:
        block, rest = name.split(".attentions.0.")
        layer, kind = rest.rsplit(".", 1)
        return block, old[layer], kind

    def prefix(found: dict[str, Tensor]) -> None:
        for name in list(found):
            found[f"text_model.{name}"] = found.pop(name)
        found["text_model.embeddings.position_ids"] = torch.arange(16)[None]

    held(held(copy, VAE, age), TEXT, prefix)
    aged, base, pipe = opened(copy), opened(folder), StableDiffusionPipeline.from_pretrained(copy)
    vae = aged.pipeline("text2image").vae
    assert any("query" in name for name in load_file(copy / VAE))
    assert same(weights(vae), weights(base.pipeline("text2image").vae))
    assert same(weights(vae), weights(pipe.vae))
    assert torch.equal(aged.encode_prompt("a cat").tokens, base.encode_prompt("a cat").tokens)


def test_what_configs_say_to_libraries_is_not_heard(copy: Path, folder: Path) -> None:
    """Where to find code, which kernels to load, where the files of a tokenizer are."""
    code = {"auto_map": {"AutoModel": "own.X", "AutoTokenizer": ["own.X", None]}, "trust_remote_code": True}
    said(copy, "unet/config.json", **code)
    said(copy, "vae/config.json", **code)
    said(copy, "text_encoder/config.json", **code, attn_implementation="own/x")
    said(copy, "tokenizer/tokenizer_config.json", **code, tokenizer_file="/etc/passwd", vocab_file="/etc/passwd")
    (copy / "text_encoder/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "own/x", "peft_type": "LORA"}))
    one, other = opened(copy), opened(folder)
    assert torch.equal(one.encode_prompt("a cat").tokens, other.encode_prompt("a cat").tokens)
    assert same(weights(one.denoiser), weights(other.denoiser))


@each(
    "values, why",
    [
        ({"model_max_length": 2}, "the model_max_length 2.*at least 16, the max_position_embeddings of the text encoder"),
        ({"model_max_length": 15}, "the model_max_length 15"),
        ({"model_max_length": "x"}, "tokenizer cannot be loaded"),
        ({"model_max_length": -1}, "the model_max_length -1"),
        ({"pad_token": "<pad>"}, "has the token id 54.*ids below 54"),
        ({"unk_token": "<unk>"}, "tokenizer cannot be loaded"),
    ],
)
def test_a_tokenizer_fits_the_text_encoder(tmp_path: Path, folder: Path, values: dict[str, Any], why: str) -> None:
    """It encodes prompts of the full length, with token ids that the text encoder knows."""
    copy = copied(folder, tmp_path)
    with pytest.raises(ImagicError, match=why):
        opened(said(copy, "tokenizer/tokenizer_config.json", **values))


def test_a_tokenizer_without_a_length_has_that_of_the_text_encoder(copy: Path, folder: Path) -> None:
    """transformers writes 10^30 for a length that nobody gave."""
    said(copy, "tokenizer/tokenizer_config.json", model_max_length=int(1e30))
    assert torch.equal(opened(copy).encode_prompt("a cat").tokens, opened(folder).encode_prompt("a cat").tokens)


def test_a_tokenizer_may_be_a_vocabulary_and_merges(copy: Path, folder: Path) -> None:
    """As older bases have it."""
    made = json.loads((copy / "tokenizer/tokenizer.json").read_text())["model"]
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text(json.dumps(made["vocab"]))
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    assert torch.equal(opened(copy).encode_prompt("a cat").tokens, opened(folder).encode_prompt("a cat").tokens)


def test_of_a_hub_id_nothing_is_fetched_that_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs, vocabulary and the safetensors files in fp32: neither code nor pickles; and the index is vetted after the fetching."""
    asked: list[str] = []

    def fetch(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (source, revision) == ("own/base", "main")
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(registry, "snapshot_download", fetch)
    assert locate("own/base", "main") == folder
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} <= set(asked)
    assert {Path(name).suffix for name in asked} == {".json", ".txt", ".jinja", ".safetensors"}
    assert not [name for name in asked if "*" in name]


@each("error", [OSError(), OSError("no network\nat all"), ValueError("no such id")])
def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """With the first line of the reason."""

    def fetch(*_, **__) -> str:
        raise error

    monkeypatch.setattr(registry, "snapshot_download", fetch)
    why = str(error).split("\n")[0] or "OSError"
    with pytest.raises(ImagicError, match=rf"base own/base cannot be downloaded \({why}\)"):
        locate("own/base")


@each("name", ["~no-such-user/x/y", "a" * 5000, "\0"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    """Whatever the system says of it."""
    with pytest.raises(ImagicError, match=r"no base called|no file or folder ~no-such-user"):
        locate(name)


def test_xformers_is_enabled_on_the_denoiser_or_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers enables it: here it raises, since there is no card; with a card every attention of the denoiser gets it."""
    runtime = resolve_runtime(MemoryConfig(device="cpu"))
    asked = replace(runtime, memory=runtime.memory.model_copy(update={"attention": "xformers"}))
    with pytest.raises(ImagicError, match=r"xformers does not work on this machine \(.*--attention sdpa"):
        registry.load_base(str(folder), asked)
    enabled: set[torch.nn.Module] = set()
    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", lambda self, on, _: on and enabled.add(self))
    registry.load_base(str(folder), runtime)
    assert not enabled
    base = registry.load_base(str(folder), asked)
    assert enabled == {module for module in base.denoiser.modules() if isinstance(module, Attention)} != set()
