"""Old and odd configs: noise schedule, training target, size and images are those of plain diffusers with the same folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, each, loaded, opened
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    schedulers,
)
from tiny import NOISE, save_tiny, save_tiny_sdxl

from imagic_lora.bases.loading.configs import architecture, with_entry
from imagic_lora.bases.loading.known import BaseEntry
from imagic_lora.bases.loading.schedulers import converted, training_scheduler
from imagic_lora.bases.loading.vetting import SCHEDULERS
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import Canvas
from imagic_lora.sampling.generate import generate

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and numpy about outdated configs and code

AVAILABLE = [name for name in SCHEDULERS if "dummy" not in getattr(schedulers, name).__module__]
PIPELINES: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
OPTIONS: dict[str, Any] = {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}
VALUES: dict[str, list[Any]] = {  # what old and odd configs have; ... leaves the key out
    "beta_schedule": [..., "linear", "scaled_linear"],
    "beta_start": [..., 0.00085],
    "beta_end": [..., 0.012],
    "prediction_type": [..., "epsilon", "v_prediction", "sample"],
    "clip_sample": [..., True, False],
    "steps_offset": [..., 0, 1],
    "set_alpha_to_one": [..., True, False],
    "timestep_spacing": [..., "leading", "trailing", "linspace"],
    "rescale_betas_zero_snr": [..., True, False],
    "num_train_timesteps": [..., 1000, 500],
    "skip_prk_steps": [..., True, True],
    "use_karras_sigmas": [..., False, True],
    "tensor_format": [..., "pt"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each family, to change."""
    root = tmp_path_factory.mktemp("outdated")
    return {"sd": save_tiny(root / "sd"), "sdxl": save_tiny_sdxl(root / "sdxl")}


def declare(folder: Path, name: str, config: dict[str, Any], config_class: str | None = None) -> Path:
    """Writes the config of a scheduler; the index names its class, the config another one where ``config_class`` is given."""
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": config_class or name} | config))
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def drawn(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class with a bare config, then random configs."""
    chance = random.Random(5)
    yield from ((name, {}) for name in AVAILABLE)
    for k in range(count):
        config = {key: chance.choice(values) for key, values in VALUES.items()}
        yield AVAILABLE[k % len(AVAILABLE)], {key: value for key, value in config.items() if value is not ...}


def public(config: Any) -> dict[str, Any]:
    """The settings of a config, without what diffusers keeps about them."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def check_training(base: Any, plain: Any) -> None:
    """Compares noisy latents and target with their equations, for the schedule and the prediction type of a pipeline of diffusers."""
    config, alphas = plain.scheduler.config, plain.scheduler.alphas_cumprod
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    times = base.timesteps(torch.tensor([0.0, 0.4, 0.999]))
    if base.process.trained_timesteps is None:  # not a consistency model
        assert times.tolist() == [0, int(0.4 * config.num_train_timesteps), config.num_train_timesteps - 1]
    signal, sigma = (part.sqrt().view(-1, 1, 1, 1) for part in (alphas[times], 1 - alphas[times]))
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}
    assert torch.allclose(base.noised(clean, noise, times), signal * clean + sigma * noise, atol=1e-3)  # as above: 2**-24 of the signal
    assert torch.allclose(base.target(clean, noise, times), targets[config.prediction_type], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_any_config_is_taken_as_diffusers_takes_it(bases: dict[str, Path], family: str) -> None:
    """Whatever samples in diffusers is opened, and all is equal."""
    compared, parts = 0, PIPELINES[family].from_pretrained(bases[family]).components
    for name, config in drawn(20):
        folder = declare(bases[family], name, config)
        plain = PIPELINES[family](
            **parts | {"scheduler": getattr(schedulers, name).from_pretrained(folder / "scheduler")}, **OPTIONS[family]
        )
        plain.set_progress_bar_config(disable=True)
        kwargs = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0, "height": 32, "width": 32}
        declared = public(plain.scheduler.config)
        try:
            expected = plain("a cat", **kwargs, generator=torch.Generator().manual_seed(0)).images
        except (ValueError, NotImplementedError):  # diffusers does not know the combination
            continue
        base = opened(folder)
        text = base.with_added_conditions(base.encode_prompt("a cat"), 32, 32, 1.0)
        ours: Any = base.pipeline("text2image")
        found = ours(**base.pipeline_kwargs(text, None), **kwargs, generator=torch.Generator().manual_seed(0)).images
        where = (name, config)
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), where  # no noise without signal can be predicted from it
        assert public(base.scheduler().config) == declared, where
        assert base.prediction_type == plain.scheduler.config.prediction_type, where
        assert base.resolution == plain.unet.config.sample_size * plain.vae_scale_factor, where
        alphas = base.training_scheduler.alphas_cumprod
        assert torch.allclose(alphas, plain.scheduler.alphas_cumprod, atol=1e-7, rtol=1e-5), where  # Euler keeps 2**-24 of the signal
        check_training(base, plain)
        compared += 1
    assert compared > 25


@pytest.mark.slow
@each("config", [
    {}, {"prediction_type": "v_prediction"}, {"beta_schedule": "linear", "beta_end": 0.02}, {"rescale_betas_zero_snr": True},
    {"original_inference_steps": 25}, {"timestep_spacing": "trailing", "set_alpha_to_one": False},
])  # fmt: skip
def test_a_consistency_model_is_taken_as_diffusers_takes_it(tmp_path: Path, config: dict[str, Any]) -> None:
    """By its own pipeline, with the guidance scale as an input."""
    folder = declare(save_tiny(tmp_path / "base", scheduler="lcm", guided=True), "LCMScheduler", config)
    plain: Any = LatentConsistencyModelPipeline.from_pretrained(folder, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 6.0, "height": 32, "width": 32}
    expected = plain("a cat", **kwargs, generator=torch.Generator().manual_seed(0)).images
    base = loaded(folder)
    text = base.with_added_conditions(base.encode_prompt("a cat"), 32, 32, 6.0)
    ours: Any = base.pipeline("text2image")
    found = ours(**base.pipeline_kwargs(text, None), **kwargs, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.allclose(base.training_scheduler.alphas_cumprod, plain.scheduler.alphas_cumprod, atol=1e-7)
    steps = config.get("original_inference_steps", 50)
    assert base.timesteps(torch.arange(steps) / steps).tolist() == list(range(1000 // steps - 1, 1000, 1000 // steps))


@pytest.mark.slow
@each("value", [True, False, None])
@each("family", ["sd", "sdxl"])
def test_the_mask_of_the_padding_is_used_where_the_pipeline_uses_it(
    bases: dict[str, Path], tmp_path: Path, family: str, value: Any
) -> None:
    """``use_attention_mask`` of a text encoder: by the pipelines of Stable Diffusion 1 and 2, not by that of XL."""
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_attention_mask": value}))
    plain, base = PIPELINES[family].from_pretrained(folder), opened(folder)
    for prompt in ("a cat", ""):
        expected = plain.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        assert torch.equal(base.encode_prompt(prompt).tokens, expected)
    same = torch.equal(base.encode_prompt("a cat").tokens, opened(bases[family]).encode_prompt("a cat").tokens)
    assert same == (family == "sdxl" or not value)


@pytest.mark.slow
@each("dropped", ["scaling_factor", "act_fn", "norm_num_groups", "force_upcast"])
@each("family", ["sd", "sdxl"])
def test_a_vae_without_a_setting_has_the_default_of_diffusers(bases: dict[str, Path], tmp_path: Path, family: str, dropped: str) -> None:
    """Old configs lack what later versions added."""
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    path = folder / "vae/config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != dropped}))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    try:
        plain: Any = AutoencoderKL.from_pretrained(folder / "vae")
        assert not dropped.startswith("norm_num")  # the default does not divide the channels of the tiny base
    except (ValueError, RuntimeError):
        with pytest.raises(ImagicError):
            opened(folder)
        return
    base = opened(folder)
    with torch.no_grad():
        expected = plain.encode(pixels).latent_dist.mode() * plain.config.scaling_factor
        decoded = plain.decode(expected / plain.config.scaling_factor).sample
    assert torch.equal(base.encode_image(pixels), expected)
    assert torch.equal(base.decode(expected), decoded)


@pytest.mark.slow
@each("version", [..., "0.6", "0.8.1", "0.9.0.dev0", "0.10.2"])
@each("family", ["sd", "sdxl"])
def test_the_size_of_an_old_base_is_that_of_its_pipeline(bases: dict[str, Path], tmp_path: Path, family: str, version: Any) -> None:
    """Before version 0.9 configs had the size 32 of another model, and the pipelines of Stable Diffusion 1 and 2 take 64 instead."""
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    path = folder / "unet/config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_diffusers_version"}
    path.write_text(json.dumps(config | ({} if version is ... else {"_diffusers_version": version})))
    plain = PIPELINES[family].from_pretrained(folder)
    base = opened(folder)
    assert base.resolution == architecture(str(folder)).resolution == plain.unet.config.sample_size * plain.vae_scale_factor
    assert base.denoiser.config.sample_size == plain.unet.config.sample_size
    given = with_entry(architecture(str(folder)), BaseEntry(source="x", resolution=128))
    assert given.resolution == 128


@each("name", AVAILABLE)
def test_other_classes_have_the_schedule_of_the_own_one(name: str) -> None:
    """Whatever the defaults of the classes are: those of Heun, KDPM2, LCM and TCD are not DDIM's. Nothing is clipped that was not."""
    own: Any = getattr(schedulers, name)(prediction_type="v_prediction", num_train_timesteps=500)
    others: list[Any] = [training_scheduler(own), converted(own, DDIMScheduler)]
    for other in others:
        assert torch.equal(other.alphas_cumprod, own.alphas_cumprod)
        assert (other.config.prediction_type, other.config.num_train_timesteps) == ("v_prediction", 500)
    assert converted(own, DDIMScheduler).config.clip_sample == own.config.get("clip_sample", False)
    assert converted(own, DDIMScheduler).config.set_alpha_to_one == own.config.get("set_alpha_to_one", True)
    assert converted(own, DDIMScheduler).config.timestep_spacing == "leading"


@each("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_a_schedule_without_signal_at_its_end_is_one_for_both(name: str) -> None:
    """Training and inversion end where the sampler begins; a class that does not know the setting samples and trains without it."""
    own: Any = getattr(schedulers, name).from_config(NOISE | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    for other in (training_scheduler(own), converted(own, DDIMScheduler)):
        assert torch.allclose(other.alphas_cumprod, own.alphas_cumprod, atol=1e-7)
        assert (other.alphas_cumprod[-1] == 0) == (name != "PNDMScheduler")
    assert converted(own, DDIMScheduler).config.timestep_spacing == "trailing"


@pytest.mark.slow
@each("start, ddim_eta", [("inverted", 0.0), ("inverted", 1.0)])
@each("family", ["sd", "sdxl"])
def test_an_inversion_clips_nothing_that_the_sampler_does_not(
    bases: dict[str, Path], tmp_path: Path, family: str, start: Any, ddim_eta: float
) -> None:
    """A config that says nothing about clipping, timesteps and their offset, and one that says all: the same noise and the same image."""
    silent, explicit = {}, {"clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1 if family == "sd" else 0}
    images = []
    for k, extra in enumerate((silent, explicit)):
        folder = Path(shutil.copytree(bases[family], tmp_path / str(k)))
        path = folder / "vae/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 8.0}))  # latents larger than 1
        declare(folder, "EulerDiscreteScheduler", {name: NOISE[name] for name in NOISE if name != "steps_offset"} | extra)
        base = opened(folder)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        canvas = Canvas(pixels, (0, 0, 32, 32), (32, 32))
        text = base.with_added_conditions(base.encode_prompt("a cat"), 32, 32, 1.0)
        config = EditConfig(steps=4, guidance_scale=1.0, start=start, ddim_eta=ddim_eta)
        clean = base.encode_image(canvas.pixels)
        assert clean.abs().max() > 1  # clipping would change it
        images += [array(image) for image in generate(base, [text], [0], config, canvas, None, [text])]
    assert np.array_equal(images[0], images[1])
