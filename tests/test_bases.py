"""Bases: what they answer is what diffusers, or the equation, answers."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from common import KINDS, opened, same, weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny import save_tiny
from torch import Tensor

from imagic_lora.bases.files import fingerprint
from imagic_lora.bases.registry import architecture_of, locate
from imagic_lora.errors import ImagicError

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
    assert type(base.training) is DDPMScheduler
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
    base.training.register_to_config(num_train_timesteps=50)
    assert base.timesteps(torch.tensor([0.5, 0.999])).tolist() == [25, 49]


def test_predict_is_the_unet_and_broadcasts(folder: Path) -> None:
    """A conditioning of one serves the whole batch, as if it were repeated."""
    base, (x_t, _) = opened(folder), samples()
    text = base.encode_text("a cat")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert torch.equal(base.predict(x_t, STEPS, text), unet(x_t, STEPS, text.tokens.repeat(4, 1, 1)).sample)


@pytest.mark.parametrize("prompt", ["a cat", "", "a b c d e f g h i j k l m n"])
def test_encode_text_is_that_of_diffusers(folder: Path, prompt: str) -> None:
    """Bit-equal to the pipeline's encode_prompt, to the longest prompt that fits."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(opened(folder).encode_text(prompt).tokens, expected)


def test_a_long_prompt_says_what_it_lost(folder: Path) -> None:
    """Of 20 words of one token 14 fit; the rest is named, and the embedding is that of diffusers."""
    words = "abcdefghijklmnopqrst"
    with pytest.warns(UserWarning, match="14 tokens.*lost: 'o p q r s t ?'"):
        tokens = opened(folder).encode_text(" ".join(words)).tokens
    assert torch.equal(tokens, opened(folder).encode_text(" ".join(words[:14])).tokens)


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
def test_what_rests_comes_back_when_it_is_used(folder: Path, idle: str) -> None:
    """Kept it is the same module, released it is gone and read again: frozen, its levers pulled, its answers bit-equal."""
    base = opened(folder, idle=idle, vae_slicing=True)
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    helpers = [weakref.ref(module) for module in (base.pipeline("text2image").vae, base._helpers["text_encoder"])]
    latents, text = base.encode_image(image), base.encode_text("a cat").tokens
    picture = base.decode(latents)
    base.rest()
    gc.collect()
    assert [helper() is None for helper in helpers] == [idle == "release"] * 2
    assert torch.equal(base.decode(latents), picture)
    assert torch.equal(base.encode_image(image), latents)
    assert torch.equal(base.encode_text("a cat").tokens, text)
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
    assert (loaded.resolution, loaded.factor) == (read.resolution, read.factor) == (32, 4)
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        ours = json.loads(json.dumps(getattr(loaded, part), default=str))
        theirs = {name: value for name, value in getattr(read, part).items() if not name.startswith("_") and name in ours}
        assert len(theirs) > 5
        assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("name", ["no-such-base", "/no/such"])
def test_an_unknown_base_has_no_architecture(name: str) -> None:
    """It is refused as it would be on opening."""
    with pytest.raises(ImagicError, match="no base called"):
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


@pytest.mark.parametrize("name", ["no-such-base", "./no/such/folder", "/no/such", "a/b/c"])
def test_an_unknown_base_is_refused(name: str) -> None:
    """A name that is neither known nor a folder nor shaped like a hub id is never looked for on the network."""
    with pytest.raises(ImagicError, match="no base called"):
        locate(name)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    """It must hold model_index.json."""
    with pytest.raises(ImagicError, match=r"no model_index\.json"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"), [('{"_class_name": "FluxPipeline"}', "FluxPipeline"), ("{", "cannot be read"), ("[]", "cannot be read")]
)
def test_an_unsupported_family_is_refused(tmp_path: Path, index: str, message: str) -> None:
    """Named by its class; an index that is no index is refused as such."""
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ImagicError, match=message):
        opened(tmp_path)


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    """A component that lost its file is the user's to mend."""
    save_tiny(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ImagicError, match="cannot be loaded"):
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
    for open_it in (lambda: opened(tmp_path / "base"), lambda: fingerprint(tmp_path / "base", ("unet",))):
        with pytest.raises(ImagicError):
            open_it()


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    """It would be ignored."""
    with pytest.raises(ImagicError, match="--revision main of the folder"):
        locate(str(folder), "main")


def test_a_base_remembers_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is kept whole, so that its adapters work from anywhere."""
    monkeypatch.chdir(folder.parent)
    assert opened(Path(folder.name)).name == str(folder.resolve())
