"""What a single file says of itself, and what looks like a known model: heard, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import each, opened, same, weights
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from original import write_single
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sdxl
from torch import Tensor

from imagic_lora.bases.architecture import Architecture
from imagic_lora.bases.loading.configs import architecture, architecture_at
from imagic_lora.bases.loading.known import VARIABLE, BaseEntry
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime

UNET = "model.diffusion_model."
MARKS = {
    "sd15": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "sd21": "cond_stage_model.model.ln_final.weight",
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
}
V1: dict[str, Any] = {  # the config of Stable Diffusion 1 in the original code, shortened
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "base_learning_rate": 1e-4,
    "params": {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "timesteps": 1000,
        "conditioning_key": "crossattn",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {"image_size": 32, "in_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_heads": 8},
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    },
}


def file(
    folder: Path,
    kind: str,
    *names: str,
    said: Mapping[str, str] | None = None,
    beside: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    unet: Mapping[str, list[int]] | None = None,
) -> Path:
    """A file with the mark of a family, more tensors, metadata, a JSON and a YAML file beside it, and tensors of a U-Net by shape."""
    path = folder / "one.safetensors"
    tensors = {name: torch.zeros(1) for name in (MARKS[kind], *names)}
    tensors |= {UNET + name: torch.empty(shape, dtype=torch.bool) for name, shape in (unet or {}).items()}
    save_file(tensors, path, metadata=dict(said or {}))
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))
    if config is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": config}))
    return path


def params(**changes: Any) -> dict[str, Any]:
    """The config of Stable Diffusion 1 with other parameters."""
    return V1 | {"params": V1["params"] | changes}


def read(path: Path) -> Architecture:
    return architecture(str(path))


SAID: list[tuple[dict[str, Any], str]] = [
    ({"names": ["v_pred"]}, "v_prediction"),
    ({"names": ["V"]}, "v_prediction"),
    ({"said": {"modelspec.predict_key": "v"}}, "v_prediction"),
    ({"said": {"modelspec.predict_key": "epsilon"}}, "epsilon"),
    ({"said": {"modelspec.prediction_type": "V"}}, "v_prediction"),
    ({"said": {"modelspec.prediction_type": "v_prediction"}}, "v_prediction"),
    ({"said": {"modelspec.prediction_type": "x0"}}, "sample"),
    ({"said": {"ss_v_parameterization": "True"}}, "v_prediction"),
    ({"said": {"ss_v_parameterization": "False", "modelspec.prediction_type": ""}}, "epsilon"),
    ({"beside": {"modelspec.prediction_type": "v"}}, "v_prediction"),
    ({"beside": {"description": "a model", "sd version": "SD1", "preferred weight": 0}}, "epsilon"),
    ({"config": params(parameterization="v")}, "v_prediction"),
    ({"config": V1}, "epsilon"),
    ({"names": ["v_pred"], "said": {"modelspec.predict_key": "v"}, "config": params(parameterization="v")}, "v_prediction"),
]


@each("given, expected", SAID)
@each("kind", ["sd15", "sdxl"])
def test_the_prediction_type_is_heard_in_every_tools_words(tmp_path: Path, kind: str, given: dict[str, Any], expected: str) -> None:
    """Tensors, metadata, a JSON file and a YAML file beside it; the rest of the schedule stays as published."""
    given = dict(given)
    if kind == "sdxl" and "config" in given:
        stated = given["config"]["params"].get("parameterization", "eps")
        scaling = {"v": "VScaling", "eps": "EpsScaling"}[stated]
        denoiser = {"params": {"scaling_config": {"target": f"sgm.modules.diffusionmodules.denoiser_scaling.{scaling}"}}}
        given["config"] = {"params": {"scale_factor": 0.13025, "denoiser_config": denoiser}}
    path = file(tmp_path, kind, *given.pop("names", []), **given)
    length = {"num_train_timesteps": 1000}
    assert length | read(path).scheduler == length | PUBLISHED[kind].scheduler | {"prediction_type": expected}


@each("said, expected", [
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, ("epsilon", 512)),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v_prediction", 768)),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.resolution": "640x640"}, ("v_prediction", 640)),
    ({"modelspec.predict_key": "epsilon"}, ("epsilon", 512)),
    ({"modelspec.predict_key": "v"}, ("v_prediction", 768)),
])  # fmt: skip
def test_stable_diffusion_2_comes_in_two_sizes(tmp_path: Path, said: dict[str, str], expected: tuple[str, int]) -> None:
    """The published models that predict the noise have 512 pixels, those that predict the velocity 768."""
    built = read(file(tmp_path, "sd21", said=said))
    assert (built.scheduler["prediction_type"], built.resolution) == expected


@each("size, expected", [("1024x1024", 1024), ("832x1216", 1024), ("768", 768), (" 640 x 640 ", 640), ("", 1024)])
def test_the_size_that_a_file_states_is_its_resolution(tmp_path: Path, size: str, expected: int) -> None:
    """In pixels; the user's list overrides it."""
    path = file(tmp_path, "sdxl", said={"modelspec.resolution": size})
    assert read(path).resolution == expected
    assert architecture_at(path, BaseEntry(source="x", resolution=512)).resolution == 512


def test_turbo_says_so(tmp_path: Path) -> None:
    """The single file of SDXL Turbo is what its name stands for."""
    said = {"modelspec.architecture": "stable-diffusion-xl-turbo-v1", "modelspec.resolution": "512x512"}
    assert read(file(tmp_path, "sdxl", said=said)) == PUBLISHED["sdxl-turbo"]


@each("given, why", [
    ({"names": ["v_pred"], "said": {"modelspec.predict_key": "epsilon"}}, "is v_prediction by its tensor v_pred and epsilon by modelspec"),
    ({"said": {"modelspec.predict_key": "v", "modelspec.prediction_type": "eps"}}, "contradicts itself: prediction_type is epsilon"),
    ({"said": {"modelspec.predict_key": "v"}, "config": params(parameterization="eps")}, "and epsilon by one.yaml"),
    ({"said": {"modelspec.resolution": "512x512"}, "beside": {"modelspec.resolution": "768x768"}}, "resolution is 512 .* and 768"),
    ({"said": {"modelspec.prediction_type": "edm"}}, "says modelspec.prediction_type = 'edm'"),
    ({"said": {"modelspec.resolution": "large"}}, "says modelspec.resolution = 'large'"),
    ({"said": {"modelspec.resolution": "8x8"}}, "says modelspec.resolution = '8x8'"),
])  # fmt: skip
def test_contradictions_and_unknown_words_are_refused(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    """By name; what the user's list states overrides both sides."""
    given = dict(given)
    path = file(tmp_path, "sd15", *given.pop("names", []), **given)
    with pytest.raises(ImagicError, match=why):
        read(path)
    if "contradicts" in why or " by " in why:
        known = BaseEntry(source="x", prediction="v_prediction", resolution=512)
        assert architecture_at(path, known).scheduler["prediction_type"] == "v_prediction"


@each("config, setting, value", [
    (params(timesteps=500), "num_train_timesteps", 500),
    (params(linear_start=0.0015), "beta_start", 0.0015),
    (params(linear_end=0.0195), "beta_end", 0.0195),
    (params(beta_schedule="sqrt_linear"), "beta_schedule", "linear"),
    (params(scale_factor=0.5), "scaling_factor", 0.5),
])  # fmt: skip
def test_the_schedule_of_a_yaml_config_is_heard(tmp_path: Path, config: dict[str, Any], setting: str, value: object) -> None:
    """In diffusers' names, and the scale of the latents with it."""
    built = read(file(tmp_path, "sd15", config=config))
    assert (built.vae if setting == "scaling_factor" else built.scheduler)[setting] == value


@each("config, why", [
    (params(parameterization="edm"), "parameterization = 'edm'"),
    (params(conditioning_key="hybrid"), "conditioning_key = 'hybrid'"),
    (params(beta_schedule="cosine"), "beta_schedule = 'cosine'"),
    (params(linear_start="x"), "linear_start = 'x'"),
    (params(timesteps=10**9), "scheduler.num_train_timesteps"),
    (params(a_setting_of_tomorrow=1), "a_setting_of_tomorrow = 1"),
    (params(unet_config={"params": {"use_scale_shift_norm": True}}), "use_scale_shift_norm = True"),
    (params(unet_config={"params": {"num_heads": 4, "channel_mult": [1, 2, 4, 4]}}), r"\[4, 4, 4, 4\] attention heads"),
    (params(cond_stage_config={"target": "FrozenCLIPEmbedder", "params": {"layer": "penultimate"}}), "layer of cond_stage_config"),
    (params(cond_stage_config={"target": "FrozenOpenCLIPEmbedder"}), "layer of cond_stage_config = 'last'"),
    ({"params": {"denoiser_config": {"params": {"scaling_config": {"target": "x.EDMScaling"}}}}}, "scaling_config = 'EDMScaling'"),
    ({"params": {"denoiser_config": {"params": {"discretization_config": {"target": "EDMDiscretization"}}}}}, "EDMDiscretization"),
])  # fmt: skip
def test_a_yaml_config_of_another_model_is_refused(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    """With the setting; clip skip, inpainting, EDM."""
    with pytest.raises(ImagicError, match=why):
        read(file(tmp_path, "sd15", config=config))


def test_other_files_beside_a_checkpoint_say_nothing(tmp_path: Path) -> None:
    """The settings of its training, the workflow that made it."""
    path = file(tmp_path, "sd15")
    path.with_suffix(".yaml").write_text("learning_rate: 1\n")
    path.with_suffix(".json").write_text("[" * 100)
    assert read(path) == PUBLISHED["sd15"]
    path.with_suffix(".yaml").write_text("model: [")
    with pytest.raises(ImagicError, match=r"one.yaml cannot be read as YAML"):
        read(path)


@each("kind, sampler", [("sd15", DDIMScheduler), ("sdxl", EulerDiscreteScheduler)])
@each("given", [{"names": ["v_pred", "ztsnr"]}, {"said": {"modelspec.prediction_type": "v-zsnr"}}])
def test_a_schedule_without_signal_at_its_end_is_sampled_as_it_is_trained(
    tmp_path: Path, kind: str, sampler: Any, given: dict[str, Any]
) -> None:
    """From the last timestep on, by a sampler that knows it: PNDM does not."""
    given = dict(given)
    config = read(file(tmp_path, kind, *given.pop("names", []), **given)).scheduler
    assert config["_class_name"] == sampler.__name__
    scheduler = sampler.from_config(config)
    scheduler.set_timesteps(10)
    assert (scheduler.config.prediction_type, scheduler.timesteps[0].item()) == ("v_prediction", 999)
    assert scheduler.alphas_cumprod[-1] < 1e-7


@each("kind", ["sd15", "sd21", "sdxl"])
def test_an_inpainting_model_is_told_by_its_first_layer(tmp_path: Path, kind: str) -> None:
    """Stable Diffusion 2 then needs no prediction type; the YAML config of such models may lie beside it, and beside no other."""
    config = params(conditioning_key="hybrid", finetune_keys=None) if kind == "sd15" else None
    found = read(file(tmp_path, kind, unet={"input_blocks.0.0.weight": [320, 9, 3, 3]}, config=config))
    assert found.inpaints
    assert (found.denoiser["in_channels"], found.latent_channels) == (9, 4)
    assert found.scheduler["prediction_type"] == "epsilon"
    assert found.resolution == {"sd15": 512, "sd21": 512, "sdxl": 1024}[kind]
    assert not PUBLISHED[kind].inpaints


ALIKE: list[tuple[str, dict[str, Any], str]] = [
    ("sdxl", {"names": ["edm_mean", "edm_std"]}, "is Playground v2.5"),
    ("sdxl", {"names": ["edm_vpred.sigma_max"]}, "is a model with the noise process of EDM, such as CosXL"),
    ("sd15", {"names": ["control_model.input_blocks.0.0.weight"]}, "is a ControlNet"),
    ("sd21", {"names": ["depth_model.model.x"]}, "is the depth model"),
    ("sd21", {"names": ["embedder.model.ln_final.weight"]}, "is unCLIP"),
    ("sd15", {"names": [UNET + "input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn"]}, "is GLIGEN"),
    ("sd15", {"unet": {"input_blocks.0.0.weight": [320, 7, 3, 3]}}, "in_channels = 7"),
    ("sd15", {"unet": {"input_blocks.0.0.weight": [320, 8, 3, 3]}}, "in_channels = 8, as an InstructPix2Pix model has"),
    ("sd21", {"unet": {"input_blocks.0.0.weight": [320, 5, 3, 3]}}, "in_channels = 5, as a depth model has"),
    ("sd21", {"unet": {"label_emb.0.0.weight": [1280, 2048]}}, "label_emb = 2048, as unCLIP has"),
    ("sdxl", {"unet": {"label_emb.0.0.weight": [1280, 2560]}}, "label_emb = 2560, as the refiner has"),
    ("sd15", {"unet": {"input_blocks.0.0.weight": [320, 4, 3, 3], "time_embed.cond_proj.weight": [320, 256]}}, "time_cond_proj_dim = 256"),
    ("sd15", {"unet": {"middle_block.1.transformer_blocks.0.attn2.to_k.weight": [1280, 1024]}}, "cross_attention_dim = 1024"),
    ("sd15", {"unet": {"out.2.weight": [8, 320, 3, 3]}}, "out_channels = 8"),
    (
        "sdxl",
        {"unet": {f"input_blocks.{k}.1.transformer_blocks.{depth - 1}.norm1.weight": [1] for k, depth in ((4, 2), (7, 4))}},
        r"transformer_layers = \(0, 2, 4\), as SSD-1B has",
    ),
]


@each("kind, given, why", ALIKE)
def test_what_looks_like_a_known_model_is_refused_by_its_name(tmp_path: Path, kind: str, given: dict[str, Any], why: str) -> None:
    """Stable Diffusion 2 says here what it predicts, to be refused for nothing else."""
    given = dict(given)
    path = file(tmp_path, kind, *given.pop("names", []), said={"modelspec.predict_key": "v"}, **given)
    with pytest.raises(ImagicError, match=why):
        read(path)


@each("names, why", [
    (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "is a checkpoint of Stable Diffusion 3.*with parts: sd35-medium"),
    (["single_stream_modulation.lin.weight"], "is a checkpoint of FLUX.2.*with parts: klein-base-4b"),
    (["double_blocks.0.img_attn.norm.key_norm.scale"], "is a transformer such as FLUX"),
    (["clip_txt_mapper.weight"], "is Stable Cascade"),
    (["model.diffusion_model.encoder_hid_proj.weight"], "is Kolors"),
    (["model.diffusion_model.mlp_t5.0.weight"], "is Hunyuan-DiT"),
    (["conditioner.embedders.0.model.ln_final.weight"], "is the refiner"),
    (["cond_stage_model.roberta.embeddings.word_embeddings.weight"], "is AltDiffusion"),
    (["lora_unet_x.hada_w1_a"], "is a LoRA file"),
    (["emb_params"], "is an embedding"),
    (["model.diffusion_model.out.2.weight"], "holds a U-Net, but no text encoder.*build a folder"),
    (["down_blocks.0.resnets.0.conv1.weight"], "holds a U-Net, but no text encoder"),
    (["first_stage_model.encoder.conv_in.weight"], "holds a VAE, but no text encoder"),
    (["text_model.final_layer_norm.weight"], "holds a text encoder, but no text encoder of a known kind"),
    (["model_ema.decay"], r"holds the moving average \(EMA\) of a U-Net"),
])  # fmt: skip
def test_a_part_or_another_model_is_named(tmp_path: Path, names: list[str], why: str) -> None:
    """With what to do instead."""
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "one.safetensors")
    with pytest.raises(ImagicError, match=why):
        read(tmp_path / "one.safetensors")


def test_novelais_names_are_those_of_stable_diffusion_1(tmp_path: Path) -> None:
    """Its text encoder lacks a level of names."""
    save_file({MARKS["sd15"].replace("text_model.", ""): torch.zeros(1)}, tmp_path / "one.safetensors")
    assert read(tmp_path / "one.safetensors") == PUBLISHED["sd15"]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, dict[str, Tensor]], Any]:
    """Loads a base from the tensors of a single file, with the configs of a folder."""

    def load(folder: Path, tensors: dict[str, Tensor]) -> Any:
        save_file(tensors, tmp_path / "one.safetensors")
        (tmp_path / "bases.yaml").write_text(yaml.safe_dump({"mine": {"source": str(tmp_path / "one.safetensors"), "config": str(folder)}}))
        monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))
        return load_base("mine", resolve_runtime(MemoryConfig(device="cpu")))

    return load


Loaded = Callable[[Path, dict[str, Tensor]], Any]


@pytest.mark.slow
def test_harmless_tensors_change_nothing(tmp_path: Path, loaded: Loaded) -> None:
    """Projections, position ids, losses and moving averages, as programs leave them in a file, and NovelAI's names: the same base."""
    for kind, save in {"sd": save_tiny, "sdxl": save_tiny_sdxl}.items():
        folder = save(tmp_path / kind)
        tensors = load_file(write_single(folder, tmp_path / "whole.safetensors"))
        first = "cond_stage_model" if kind == "sd" else "conditioner.embedders.0"
        ids = torch.arange(16, dtype=torch.float32)[None]
        extras = {
            f"{first}.transformer.text_projection.weight": torch.eye(16), f"{first}.logit_scale": torch.ones(()),
            f"{first}.transformer.text_model.embeddings.position_ids": ids, "first_stage_model.loss.logvar": torch.ones(()),
            "first_stage_model.model_ema.decay": torch.ones(()), "model_ema.diffusion_modeloutbias": torch.ones(3),
            "denoiser.sigmas": torch.ones(3), "alphas_cumprod": torch.ones(3, dtype=torch.float64),
        }  # fmt: skip
        renamed = {name.replace("transformer.text_model.", "transformer."): value for name, value in (tensors | extras).items()}
        whole = opened(folder)
        for given in (tensors | extras, renamed):
            base = loaded(folder, given)
            assert base.fingerprint == whole.fingerprint
            assert torch.equal(base.encode_prompt("a cat").tokens, whole.encode_prompt("a cat").tokens)


@each("name", [
    "model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.time_embed.cond_proj.weight", "model.diffusion_model.scaled_fp8",
    "first_stage_model.shift.weight", "cond_stage_model.adapter.weight", "model.diffusion_model.out.2.scale_weight",
])  # fmt: skip
def test_a_tensor_without_a_place_is_refused(tmp_path: Path, folder: Path, loaded: Loaded, name: str) -> None:
    """diffusers leaves it out in silence: the labels of unCLIP, the guidance of LCM, the scales of fp8."""
    tensors = load_file(write_single(folder, tmp_path / "whole.safetensors"))
    with pytest.raises(ImagicError, match=f"holds '{name}', which has no place in the"):
        loaded(folder, tensors | {name: torch.ones(2, 2)})


def test_fp8_is_read(tmp_path: Path, folder: Path, loaded: Loaded) -> None:
    """To the values that it holds."""
    tensors = load_file(write_single(folder, tmp_path / "whole.safetensors"))
    eighth = {name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for name, value in tensors.items()}
    base, whole = loaded(folder, eighth), opened(folder)
    expected = {name: value.to(torch.float8_e4m3fn).float() for name, value in weights(whole.denoiser).items()}
    assert same(dict(sorted(weights(base.denoiser).items())), dict(sorted(expected.items())))
