"""Flow transformers in one file, in the original layout: against the folder that they were written from, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import each, opened, same, weights
from diffusers import AutoencoderKL, Flux2Transformer2DModel, SD3Transformer2DModel
from original import vae_names
from safetensors.torch import load_file, save_file
from tiny import save_tiny_klein, save_tiny_sd3
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import VARIABLE
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime

State = dict[str, Tensor]
Listed = Callable[..., Base]
PREFIX = "model.diffusion_model."

# the layouts of Stability AI and Black Forest Labs, written by hand from their model code
_SD3 = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}  # fmt: skip
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_KLEIN = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}  # fmt: skip
_KLEIN_DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip


def halves_swapped(tensor: Tensor) -> Tensor:
    """Shift and scale of the last norm, which diffusers has in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def joined(state: State, start: str, names: tuple[str, ...], end: str) -> Tensor:
    """Queries, keys and values in one tensor."""
    return torch.cat([state.pop(f"{start}.{name}.{end}") for name in names])


def sd3_layout(folder: Path) -> State:
    """The transformer of a folder as Stability AI writes it."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    found: State = {}
    for k in range(last + 1):
        block = f"transformer_blocks.{k}"
        for end in ("weight", "bias"):
            found[f"joint_blocks.{k}.x_block.attn.qkv.{end}"] = joined(state, f"{block}.attn", ("to_q", "to_k", "to_v"), end)
            added = ("add_q_proj", "add_k_proj", "add_v_proj")
            found[f"joint_blocks.{k}.context_block.attn.qkv.{end}"] = joined(state, f"{block}.attn", added, end)
            if f"{block}.attn2.to_q.{end}" in state:
                found[f"joint_blocks.{k}.x_block.attn2.qkv.{end}"] = joined(state, f"{block}.attn2", ("to_q", "to_k", "to_v"), end)
    for name, tensor in state.items():
        layer, _, end = name.rpartition(".")
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = tensor
        elif layer == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{end}"] = halves_swapped(tensor)
        elif name.startswith("transformer_blocks."):
            _, k, inner = layer.split(".", 2)
            swap = inner == "norm1_context.linear" and int(k) == last
            found[f"joint_blocks.{k}.{_SD3_BLOCK[inner]}.{end}"] = halves_swapped(tensor) if swap else tensor
        else:
            found[f"{_SD3[layer]}.{end}"] = tensor
    return {PREFIX + name: tensor.contiguous() for name, tensor in found.items()}


def klein_layout(folder: Path) -> State:
    """The transformer of a folder as Black Forest Labs writes it."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    found: State = {}
    norms = {"norm_q": "norm.query_norm", "norm_k": "norm.key_norm"}
    for k in {name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}:
        attention = f"transformer_blocks.{k}.attn"
        found[f"double_blocks.{k}.img_attn.qkv.weight"] = joined(state, attention, ("to_q", "to_k", "to_v"), "weight")
        found[f"double_blocks.{k}.txt_attn.qkv.weight"] = joined(state, attention, ("add_q_proj", "add_k_proj", "add_v_proj"), "weight")
        for own, original in norms.items():
            found[f"double_blocks.{k}.img_attn.{original}.scale"] = state.pop(f"{attention}.{own}.weight")
            found[f"double_blocks.{k}.txt_attn.{original}.scale"] = state.pop(f"{attention}.{own.replace('_', '_added_')}.weight")
    for name, tensor in state.items():
        layer, _, end = name.rpartition(".")
        if layer == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{end}"] = halves_swapped(tensor)
        elif name.startswith("single_transformer_blocks."):
            _, k, inner = layer.split(".", 2)
            inner = inner.removeprefix("attn.")
            own = {"to_qkv_mlp_proj": "linear1.weight", "to_out": "linear2.weight"}
            found[f"single_blocks.{k}.{own[inner] if inner in own else norms[inner] + '.scale'}"] = tensor
        elif name.startswith("transformer_blocks."):
            _, k, inner = layer.split(".", 2)
            found[f"double_blocks.{k}.{_KLEIN_DOUBLE[inner]}.{end}"] = tensor
        else:
            found[f"{_KLEIN[layer]}.{end}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each family."""
    parent = tmp_path_factory.mktemp("bases")
    return {"sd3": save_tiny_sd3(parent / "sd3"), "klein": save_tiny_klein(parent / "klein")}


LAYOUTS = {"sd3": sd3_layout, "klein": klein_layout}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listed:
    """Loads a file with these tensors and the parts of a base, from the user's list."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))
    (tmp_path / "bases.yaml").write_text("{}")

    def loaded(tensors: State, parts: Path | str, **entry: Any) -> Base:
        save_file(tensors, tmp_path / "one.safetensors")
        listed = {"mine": {"source": str(tmp_path / "one.safetensors"), "parts": str(parts)} | entry}
        (tmp_path / "bases.yaml").write_text(yaml.safe_dump(listed))
        return load_base("mine", resolve_runtime(MemoryConfig(device="cpu")))

    return loaded


@torch.no_grad()
def answer(base: Base) -> Tensor:
    """A prediction, with a prompt."""
    x = torch.randn(1, base.architecture.latent_channels, 4, 4, generator=torch.Generator().manual_seed(1))
    return base.predict(x, torch.tensor([0.7]), base.encode_prompt("a cat"))


@each("prefix", ["", PREFIX])
@each("family", ["sd3", "klein"])
def test_a_file_is_the_folder_that_it_was_written_from(folders: dict[str, Path], load: Listed, family: str, prefix: str) -> None:
    """Every weight to the bit, the fingerprint, and what the denoiser answers."""
    original = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in LAYOUTS[family](folders[family]).items()}
    base, expected = load(original, folders[family]), opened(folders[family])
    assert same(weights(base.denoiser), weights(expected.denoiser))
    assert same(*(weights(one.pipeline("text2image").vae) for one in (base, expected)))
    assert base.fingerprint == expected.fingerprint
    torch.testing.assert_close(answer(base), answer(expected))  # equal weights at another alignment in memory are rounded otherwise
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.testing.assert_close(base.encode_image(image), expected.encode_image(image))


@each("family, kind", [("sd3", SD3Transformer2DModel), ("klein", Flux2Transformer2DModel)])
def test_diffusers_reads_the_same_file(folders: dict[str, Path], tmp_path: Path, family: str, kind: Any) -> None:
    """What these tests write is what ``from_single_file`` of diffusers takes: the layout is not of our own making."""
    save_file(LAYOUTS[family](folders[family]), tmp_path / "one.safetensors")
    plain = kind.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(folders[family]), subfolder="transformer", local_files_only=True
    )
    assert same(weights(plain), weights(opened(folders[family]).denoiser))


def test_other_weights_are_another_base(folders: dict[str, Path], load: Listed) -> None:
    """A fine-tune of the transformer has its own fingerprint, and its text encoders are those of the parts."""
    tensors = sd3_layout(folders["sd3"])
    tensors[PREFIX + "final_layer.linear.weight"] += 0.1
    base, expected = load(tensors, folders["sd3"]), opened(folders["sd3"])
    assert base.fingerprint != expected.fingerprint
    assert torch.equal(base.encode_prompt("a cat").tokens, expected.encode_prompt("a cat").tokens)


def test_a_file_with_names_of_diffusers_loads_too(folders: dict[str, Path], load: Listed) -> None:
    """As its own folder writes it."""
    base = load(load_file(folders["klein"] / "transformer" / "diffusion_pytorch_model.safetensors"), folders["klein"])
    assert base.fingerprint == opened(folders["klein"]).fingerprint


def test_the_own_vae_of_a_file_is_taken(folders: dict[str, Path], load: Listed) -> None:
    """Stable Diffusion 3.5 comes with it: one whose latents differ from those of the parts."""
    plain: Any = AutoencoderKL.from_pretrained(folders["sd3"] / "vae")
    vae = {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in vae_names(plain)}
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = opened(folders["sd3"]).encode_image(image)
    same_vae = load(sd3_layout(folders["sd3"]) | vae, folders["sd3"])
    torch.testing.assert_close(same_vae.encode_image(image), expected)
    changed = {name: tensor * 1.5 if name.endswith("encoder.conv_in.weight") else tensor for name, tensor in vae.items()}
    assert not torch.allclose(load(sd3_layout(folders["sd3"]) | changed, folders["sd3"]).encode_image(image), expected)


def text_layout(folder: Path) -> State:
    """The text encoders of a folder of Stable Diffusion 3 as its single files have them: names of transformers, without one projection."""
    found: State = {"text_encoders.clip_g.logit_scale": torch.ones(())}
    for part, name in {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}.items():
        state = load_file(folder / part / "model.safetensors")
        found |= {f"text_encoders.{name}.transformer.{key}": tensor.clone() for key, tensor in state.items()}
    del found["text_encoders.clip_l.transformer.text_projection.weight"]
    return found


@pytest.fixture(scope="module")
def unprojected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose first pooled embedding is not projected: the matrix is the identity."""
    folder = save_tiny_sd3(tmp_path_factory.mktemp("texts") / "base", seed=4)
    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"text_projection.weight": torch.eye(16)}, path, metadata={"format": "pt"})
    return folder


def test_the_own_text_encoders_of_a_file_are_taken(folders: dict[str, Path], unprojected: Path, load: Listed) -> None:
    """All three, with the tokenizers of another base: prompts are encoded as by their folder, whose fingerprint the base has."""
    expected = opened(unprojected)
    whole = load(sd3_layout(unprojected) | text_layout(unprojected), folders["sd3"])
    assert whole.fingerprint == expected.fingerprint
    for name in ("tokens", "pooled"):
        torch.testing.assert_close(getattr(whole.encode_prompt("a cat"), name), getattr(expected.encode_prompt("a cat"), name))
    other = text_layout(unprojected) | {"text_encoders.clip_l.transformer.text_projection.weight": 3 * torch.eye(16)}
    assert load(sd3_layout(unprojected) | other, folders["sd3"]).fingerprint == expected.fingerprint  # ComfyUI and diffusers ignore it


def test_text_encoders_that_a_file_lacks_are_those_of_the_parts(folders: dict[str, Path], unprojected: Path, load: Listed) -> None:
    """Such as T5: the tokens of CLIP are those of the file, those of T5 those of the base in parts."""
    clips = {name: tensor for name, tensor in text_layout(unprojected).items() if "t5xxl" not in name}
    own, others = (opened(folder).encode_prompt("a cat") for folder in (unprojected, folders["sd3"]))
    found = load(sd3_layout(unprojected) | clips, folders["sd3"]).encode_prompt("a cat")
    torch.testing.assert_close(found.tokens[:, :16], own.tokens[:, :16])
    torch.testing.assert_close(found.tokens[:, 16:], others.tokens[:, 16:])
    assert not torch.allclose(own.tokens[:, 16:], others.tokens[:, 16:])


def test_a_text_encoder_that_the_parts_do_not_have_is_refused(unprojected: Path, load: Listed, tmp_path: Path) -> None:
    """T5 for a base without it: its tokens would be left out in silence."""
    parts = save_tiny_sd3(tmp_path / "without", t5=False)
    with pytest.raises(ImagicError, match=r"t5xxl.*clip_l, clip_g at most"):
        load(sd3_layout(unprojected) | text_layout(unprojected), parts)


def _without(tensors: State, end: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


@each(
    "family, change, parts, why",
    [
        ("sd3", lambda own: _without(own, "joint_blocks.1.x_block.attn.qkv.weight"), "sd3", "joint_blocks.1.x_block.attn.qkv.weight"),
        ("sd3", lambda own: own | {PREFIX + "extra.weight": torch.ones(2)}, "sd3", "extra.weight.*no place"),
        ("klein", lambda own: own | {"extra.weight": torch.ones(2)}, "klein", "extra.weight"),
        ("klein", lambda own: _without(own, "img_in.weight"), "klein", "x_embedder.weight"),
        ("sd3", lambda own: own, "klein", "a transformer of Stable Diffusion 3.*one of FLUX.2"),
        ("klein", lambda own: own, "sd3", "a transformer of FLUX.2.*one of Stable Diffusion 3"),
        ("sd3", lambda own: own | {"text_encoders.clip_l.x": torch.ones(2)}, "sd3", "'text_encoders.clip_l.x', which has no place"),
        ("sd3", lambda own: own | {"text_encoders.umt5.x": torch.ones(2)}, "sd3", "text encoders, such as 'text_encoders.umt5.x'"),
        ("klein", lambda own: own | {"text_encoders.clip_l.x": torch.ones(2)}, "klein", "text encoders, such as 'text_encoders.clip_l.x'"),
        ("sd3", lambda own: own | {"text_encoders.t5xxl.transformer.x": torch.ones(2)}, "sd3", "text_encoder_3|holds 2 weights"),
        ("sd3", lambda own: own | {"text_encoders.t5xxl.scaled_fp8": torch.ones(2)}, "sd3", "scaled_fp8.*fp8 with scales"),
        ("klein", lambda own: own | {"first_stage_model.x": torch.ones(2)}, "klein", "of a VAE"),
        ("sd3", lambda own: {"lora.weight": torch.ones(2)}, "sd3", "no transformer of a known kind"),
        ("klein", lambda own: own | {"img_in.weight": torch.ones(3, 3)}, "klein", "another shape"),
    ],
)
def test_what_does_not_fit_is_named(
    folders: dict[str, Path], load: Listed, family: str, change: Callable[[State], State], parts: str, why: str
) -> None:
    """The tensor, or the kind."""
    with pytest.raises(ImagicError, match=rf"(?s){why}"):
        load(change(LAYOUTS[family](folders[family])), folders[parts])


def test_parts_must_be_there(folders: dict[str, Path], load: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that is not downloaded, another key beside it, and a base with a U-Net."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    tensors = sd3_layout(folders["sd3"])
    with pytest.raises(ImagicError, match=r"parts = 'sd35-medium'.*hf download stabilityai/stable-diffusion-3.5-medium"):
        load(tensors, "sd35-medium")
    with pytest.raises(ImagicError, match="config and parts"):
        load(tensors, folders["sd3"], config="sd15")
    with pytest.raises(ImagicError, match="a base with a U-Net"):
        load(tensors, "critters")


def test_parts_may_be_in_the_cache_of_the_hub(
    folders: dict[str, Path], load: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named base that was downloaded, by its name."""
    snapshots = tmp_path / "hub" / "models--stabilityai--stable-diffusion-3.5-medium"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("abc")
    (snapshots / "snapshots").mkdir()
    (snapshots / "snapshots" / "abc").symlink_to(folders["sd3"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load(sd3_layout(folders["sd3"]), "sd35-medium").fingerprint == opened(folders["sd3"]).fingerprint
