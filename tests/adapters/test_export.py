"""Adapters for other programs: what plain diffusers reads back, the names that others expect, files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from common import PROMPT, TUNED, each, opened, output, slow_but, tiny_config
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from faults import Clock, by_calls, every_step
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sdxl
from torch import Tensor, nn

import imagic_lora.cli.app as cli
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter, atomic_folder
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.contents import applied, read_embeddings, save_embeddings
from imagic_lora.adapters.export import Format, export
from imagic_lora.adapters.kohya import kohya
from imagic_lora.adapters.lora import LORA_FILE
from imagic_lora.adapters.original_names import original_names
from imagic_lora.adapters.readers import check_layers, notes
from imagic_lora.adapters.record import EMBEDDINGS, RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.layers import LORA_TARGETS
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import Mode
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.training.fit import fit, result

Fitted = Callable[..., Adapter]
KINDS: list[Format] = ["kohya", "diffusers"]


@pytest.fixture(scope="module")
def xl(photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Mode, Adapter]]:
    """A tiny SDXL base, and an adapter of each mode that was fitted on it."""
    root = tmp_path_factory.mktemp("xl")
    folder, made = save_tiny_sdxl(root / "base"), {}
    for mode in TUNED:
        made[mode] = result(fit(photo_file, PROMPT, tiny_config(folder, mode), Store(root), mode))
    return folder, made


def modules(name: str, preset: str) -> list[str]:
    """The layers of a true-size U-Net that a preset adapts, as PEFT finds them."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(PUBLISHED[name].denoiser)
    ends = tuple(f".{end}" for end in LORA_TARGETS[preset])
    return [one for one, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and f".{one}".endswith(ends)]


def as_lora(layers: Iterable[str], rank: int = 4) -> dict[str, Tensor]:
    """A LoRA file on those layers, each telling its number."""
    found: dict[str, Tensor] = {}
    for k, layer in enumerate(layers):
        found |= {f"unet.{layer}.lora_A.weight": torch.full((rank, 1), k), f"unet.{layer}.lora_B.weight": torch.full((1, rank), k)}
    return {name: value.float() for name, value in found.items()}


def forged(tmp_path: Path, real: Adapter, tensors: dict[str, Tensor], target: Conditioning | None = None) -> Adapter:
    """An adapter with other LoRA layers, perhaps with other embeddings, and the right hashes."""
    with atomic_folder(tmp_path / "forged") as made:
        for name in real.record.files:
            if name == EMBEDDINGS and target:
                save_embeddings(made, {"target": target, "optimised": target})
            elif name != LORA_FILE:
                made.write(name, [(real.folder / name).read_bytes()])
        save_file(tensors, tmp_path / "lora.safetensors")
        made.write(LORA_FILE, [(tmp_path / "lora.safetensors").read_bytes()])
        made.write_manifest(RECORD, real.record)
    return Store(tmp_path).read("forged")


def of_width(width: int, pooled: bool = False) -> Conditioning:
    return Conditioning(torch.zeros(1, 2, width), torch.zeros(1, 3) if pooled else None)


def answer(base: Base, adapter: Adapter) -> Tensor:
    """The denoiser's prediction for noise, conditioned on the adapter's target prompt."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return base.predict(noise, torch.tensor([500]), read_embeddings(adapter)["target"])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def said(what: str | None) -> AbstractContextManager[Any]:
    """Expects a warning, or none."""
    return pytest.warns(ImagicWarning, match=what) if what else nullcontext()


# Read back by plain diffusers


@pytest.mark.parametrize("preset", ["attention+conv", "all"])
def test_diffusers_reads_kohya_s_layout_back(folder: Path, fitted: Fitted, tmp_path: Path, preset: str) -> None:
    """The same output as the adapter's own, though alpha is not its rank and readers of that layout may ignore it."""
    base, bare = opened(folder), output(opened(folder))
    adapter = fitted("lora")
    assert adapter.record.config.tune.alpha != adapter.record.config.tune.rank
    if preset == "all":
        adapter = compress(fitted("full"), base, 4, Store(tmp_path), "small")
    with applied(adapter, base):
        expected = output(base)
    with said("leave out" if preset == "all" else None):
        weights = export(adapter, "kohya", tmp_path / "out")[0]
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(weights)
    base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(output(base), expected, rtol=0, atol=1e-5)
    assert (bare - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["attention+conv", "all"])
def test_diffusers_reads_sdxl_s_names_back(xl: tuple[Path, dict[Mode, Adapter]], tmp_path: Path, preset: str) -> None:
    """Under the names of Stability's code: the same output as the adapter's own."""
    folder, made = xl
    base = opened(folder)
    adapter = made["lora"] if preset != "all" else compress(made["full"], base, 4, Store(tmp_path), "small")
    bare = answer(base, adapter)
    with applied(adapter, base):
        expected = answer(base, adapter)
    with said("leave out" if preset == "all" else None):
        weights = export(adapter, "kohya", tmp_path / "out")[0]
    assert all(name.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output", "lora_unet_time", "lora_unet_label",
                                "lora_unet_out_2")) for name in load_file(weights))  # fmt: skip
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_lora_weights(weights)
    base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(answer(base, adapter), expected, rtol=0, atol=1e-5)
    assert (bare - expected).abs().max() > 0.01


@pytest.mark.parametrize("mode", TUNED)
def test_diffusers_reads_its_own_layout(folder: Path, fitted: Fitted, tmp_path: Path, mode: Mode) -> None:
    """By the call that the page names: the very output of the adapter."""
    base, adapter = opened(folder), fitted(mode)
    with applied(adapter, base):
        expected = output(base)
    made = export(adapter, "diffusers", tmp_path)[0].parent
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    if mode == "lora":
        pipe.load_lora_weights(made)
        base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    else:
        base._denoiser = UNet2DConditionModel.from_pretrained(made)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(output(base), expected)


def test_an_adapter_without_weights_is_its_embeddings_and_a_page(fitted: Fitted, tmp_path: Path) -> None:
    """In a folder for diffusers, which holds nothing else; the page does not speak of weights that are to be loaded."""
    adapter = fitted("embedding")
    embeddings, page = export(adapter, "diffusers", tmp_path)
    assert sorted((tmp_path / adapter.name).iterdir()) == sorted([embeddings, page])
    assert embeddings.read_bytes() == (adapter.folder / EMBEDDINGS).read_bytes()
    text = page.read_text()
    assert "There are none. The edit uses the denoiser of the base" in text
    assert f"The embeddings in `{EMBEDDINGS}` are the whole edit." in text
    assert not [word for word in ("load_lora_weights", "from_pretrained", "other half", "accepts no embeddings") if word in text]


# Names


@pytest.mark.parametrize("name", slow_but(["sd15"], ["sd15", "sd21", "sdxl"]))
def test_original_names_are_those_of_a_checkpoint(name: str) -> None:
    """diffusers' conversion of a single file makes of each name the one it came from; a preset of fewer layers has the same names."""
    layers = modules(name, "all")
    found = original_names(layers)
    parts = {"weight": lambda layer: layer, "bias": lambda _: None}
    checkpoint = {f"model.diffusion_model.{new}.{part}": of(layer) for layer, new in found.items() for part, of in parts.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, PUBLISHED[name].denoiser)
    assert {new.removesuffix(".weight"): layer for new, layer in converted.items() if layer} == {layer: layer for layer in layers}
    for preset in LORA_TARGETS:
        assert original_names(modules(name, preset)) == {layer: found[layer] for layer in modules(name, preset)}


@each("name, count", [("sd15", 128), ("sd21", 128), ("sdxl", 560)])
def test_attention_alone_has_the_known_number_of_layers(fitted: Fitted, tmp_path: Path, name: str, count: int) -> None:
    """16 or 70 transformer blocks of eight projections; three tensors for each."""
    layers = modules(name, "attention")
    made = kohya(forged(tmp_path, fitted("lora"), as_lora(layers), of_width(32, pooled=name == "sdxl")))
    assert len(layers) == count
    assert len(made) == 3 * count


@pytest.mark.parametrize("preset", LORA_TARGETS)
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_diffusers_finds_every_layer_again(fitted: Fitted, tmp_path: Path, name: str, preset: str) -> None:
    """Its own readers make of kohya's names the layers that they came from, with the right matrices."""
    layers = modules(name, preset)
    made = kohya(forged(tmp_path, fitted("lora"), as_lora(layers), of_width(32, pooled=name == "sdxl")))
    unet: Any = type("Config", (), PUBLISHED[name].denoiser)
    mapped = _maybe_map_sgm_blocks_to_diffusers(made, unet)
    state, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    downs = {key: int(value[0, 0]) for key, value in state.items() if ".down." in key}
    named = {
        key.removeprefix("unet.").replace(".processor", "").split(".lora.down")[0].split("_lora.down")[0].replace("to_out", "to_out.0"): k
        for key, k in downs.items()
    }
    assert named == {layer: k for k, layer in enumerate(layers)}
    assert set(alphas.values()) == {4.0}


def test_names_are_the_published_ones(fitted: Fitted, tmp_path: Path) -> None:
    """Some that LoRA files in the wild have, by hand."""
    wild = {
        "sd15": {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_up_blocks_1_resnets_0_conv1",
            "lora_unet_down_blocks_2_downsamplers_0_conv",
        },
        "sdxl": {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
            "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v",
            "lora_unet_output_blocks_0_1_transformer_blocks_3_attn2_to_k",
            "lora_unet_output_blocks_5_1_proj_out",
            "lora_unet_input_blocks_3_0_op",
            "lora_unet_input_blocks_7_0_skip_connection",
            "lora_unet_output_blocks_2_2_conv",
            "lora_unet_output_blocks_8_0_out_layers_3",
            "lora_unet_middle_block_2_in_layers_2",
            "lora_unet_input_blocks_1_0_emb_layers_1",
        },
    }
    for name, expected in wild.items():
        layers = as_lora(modules(name, "all"))
        made = kohya(forged(tmp_path / name, fitted("lora"), layers, of_width(32, pooled=name == "sdxl")))
        assert expected <= {key.partition(".")[0] for key in made}


@each("layer", ["down_blocks.0.resnets.0.conv3", "down_blocks.0.motion_modules.0.to_q", "class_embedding.linear_1", ""])
def test_a_layer_without_such_a_name_is_refused(layer: str) -> None:
    """Rather than written under a name that nobody reads."""
    with pytest.raises(ImagicError, match="a LoRA layer on"):
        original_names([*modules("sdxl", "attention"), layer])


# What its readers make of it


@pytest.mark.slow
@each("name, left_out", [("sd15", 4), ("sd21", 4), ("sdxl", 6)])
@each("preset", list(LORA_TARGETS))
def test_layers_that_sd_scripts_leave_out_are_said(fitted: Fitted, tmp_path: Path, name: str, left_out: int, preset: Any) -> None:
    """Those outside of blocks: it looks for layers in Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D alone."""
    layers = kohya(forged(tmp_path, fitted("lora"), as_lora(modules(name, preset)), of_width(32, pooled=name == "sdxl")))
    found = notes({key.partition(".")[0] for key in layers}, "a cat", True)
    total = {"sd15": 282, "sd21": 282, "sdxl": 794}[name]
    expected = [f"leave out {left_out} of the {total} layers"] if preset == "all" else []
    assert len(found) == len(expected)
    assert all(text in note for text, note in zip(expected, found, strict=True))


def test_a_layer_that_no_reader_knows_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    """The guidance scale of a consistency model, which ComfyUI, A1111 and sd-scripts leave out; nothing is written."""
    adapter = forged(tmp_path, fitted("lora"), as_lora([*modules("sd15", "attention"), "time_embedding.cond_proj"]))
    with pytest.raises(ImagicError, match=r"a LoRA layer on time_embedding\.cond_proj.*--format diffusers"):
        export(adapter, "kohya", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_layers({"lora_unet_time_embedding_linear_1"})


@each("prompt, openclip, expected", [
    ("a cat", True, []), ("a cat!", False, []), ("a cat!", True, ["exclamation mark"]), ("a (red) cat", False, ["as commands"]),
    ("cats AND dogs", True, ["as commands"]), ("a cat, a band and a breakfast: 12:30", True, []),
    ("a [cat]!", True, ["exclamation mark", "as commands"]),
])  # fmt: skip
def test_a_prompt_that_a_reader_takes_otherwise_is_said(prompt: str, openclip: bool, expected: list[str]) -> None:
    """Where a program reads the prompt instead of the embeddings."""
    found = notes({"lora_unet_x"}, prompt, openclip)
    assert len(found) == len(expected)
    assert all(text in note for text, note in zip(expected, found, strict=True))


def test_the_page_says_what_the_export_said(fitted: Fitted, tmp_path: Path) -> None:
    """Every note that was a warning."""
    adapter = forged(tmp_path, fitted("lora"), as_lora(modules("sd15", "all")))
    with pytest.warns(ImagicWarning, match="leave out 4 of the 282 layers") as caught:
        page = export(adapter, "kohya", tmp_path / "out")[2].read_text()
    assert str(caught[0].message) in page


# What is in the files


def test_the_scale_is_in_the_second_matrix(fitted: Fitted, tmp_path: Path) -> None:
    """alpha is the rank, so that it is no matter whether a reader looks at it."""
    adapter = fitted("lora")
    stored, found = load_file(adapter.folder / LORA_FILE), load_file(export(adapter, "kohya", tmp_path)[0])
    assert len(found) == len(stored) // 2 * 3
    for name, value in stored.items():
        layer, _, matrix = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        key = f"lora_unet_{layer.replace('.', '_')}"
        assert found[f"{key}.alpha"].item() == 4.0
        if matrix == "lora_A":
            assert torch.equal(found[f"{key}.lora_down.weight"], value)
        else:
            assert torch.equal(found[f"{key}.lora_up.weight"], value * 0.5)


@each(
    "width, pooled, expected",
    [
        (768, False, ("stable-diffusion-v1/lora", "diffusers", "sd_v1", "False")),
        (1024, False, ("stable-diffusion-v2-512/lora", "diffusers", "sd_v2", "True")),
        (2048, True, ("stable-diffusion-xl-v1-base/lora", "https://github.com/Stability-AI/generative-models", "sdxl_base_v1-0", "False")),
    ],
)
def test_the_metadata_has_the_base_and_the_settings(
    fitted: Fitted, tmp_path: Path, width: int, pooled: bool, expected: tuple[str, ...]
) -> None:
    """In the words of kohya's scripts, by which readers sort their files."""
    adapter = forged(tmp_path, fitted("lora"), as_lora(modules("sdxl", "attention")), of_width(width, pooled))
    found, tune = metadata(export(adapter, "kohya", tmp_path / "out")[0]), adapter.record.config.tune
    names = ("modelspec.architecture", "modelspec.implementation", "ss_base_model_version", "ss_v2")
    assert tuple(found[name] for name in names) == expected
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert (found["modelspec.title"], found["ss_output_name"], found["modelspec.description"]) == ("forged", "forged", PROMPT)
    assert (found["modelspec.resolution"], found["ss_resolution"]) == ("32x24", "(32, 24)")
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == ("networks.lora", "4", "4.0")
    assert (found["ss_steps"], found["ss_learning_rate"], found["ss_seed"]) == (str(tune.steps), str(tune.learning_rate), "0")
    assert found["ss_sd_model_name"] == adapter.record.base.name


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_a_page_are_exported_too(fitted: Fitted, tmp_path: Path, kind: Format) -> None:
    """Byte for byte; the page names every tensor with its shape, the target prompt, and what loads the weights."""
    adapter = fitted("lora")
    weights, embeddings, page = export(adapter, kind, tmp_path)
    assert embeddings.read_bytes() == (adapter.folder / EMBEDDINGS).read_bytes()
    text = page.read_text()
    for name, value in load_file(embeddings).items():
        assert f"- `{name}` {list(value.shape)}\n" in text
    assert f"    {json.dumps(PROMPT)}\n" in text
    assert f"`{embeddings.name}`" in text
    assert (weights.name if kind == "kohya" else "load_lora_weights") in text
    folder = tmp_path if kind == "kohya" else tmp_path / adapter.name
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (weights, embeddings, page))


@pytest.mark.slow
def test_the_page_lists_sdxl_s_embeddings(xl: tuple[Path, dict[Mode, Adapter]], tmp_path: Path) -> None:
    """The pooled ones and the size ids are there, and said to be."""
    _, embeddings, page = export(xl[1]["lora"], "kohya", tmp_path)
    lines = [line for line in page.read_text().splitlines() if line.startswith("- `")]
    assert lines == [f"- `{name}` {list(value.shape)}" for name, value in sorted(load_file(embeddings).items())]
    assert {"target.pooled", "optimised.pooled", "target.time_ids"} <= load_file(embeddings).keys()


# What is refused, and what stays whole


def listing(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_full_weights_have_no_kohya_layout(fitted: Fitted, tmp_path: Path) -> None:
    """The error says what makes LoRA layers of them; nothing is written."""
    with pytest.raises(ImagicError, match=f"imagic-lora compress {fitted('full').name} "):
        export(fitted("full"), "kohya", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each("kind", KINDS)
def test_files_are_replaced_only_if_asked_for(fitted: Fitted, tmp_path: Path, kind: Format) -> None:
    """One that is there is enough to refuse all; what else lies in the folder stays in any case."""
    adapter = fitted("lora")
    paths = export(adapter, kind, tmp_path)
    expected = listing(tmp_path)
    for path in paths[1:]:
        path.unlink()
    paths[0].write_bytes(b"mine")
    (paths[0].parent / "other.safetensors").write_bytes(b"mine too")
    before = listing(tmp_path)
    with pytest.raises(ImagicError, match=r"exists\. Expected: a new file"):
        export(adapter, kind, tmp_path)
    assert listing(tmp_path) == before
    export(adapter, kind, tmp_path, overwrite=True)
    other = (paths[0].parent / "other.safetensors").relative_to(tmp_path).as_posix()
    assert listing(tmp_path) == expected | {other: b"mine too"}


def test_an_output_that_cannot_be_written_is_refused_before_the_work(fitted: Fitted, tmp_path: Path) -> None:
    """A folder in place of the second file: the first one is not replaced."""
    adapter = fitted("lora")
    weights, embeddings, _ = export(adapter, "kohya", tmp_path)
    weights.write_bytes(b"old")
    embeddings.unlink()
    embeddings.mkdir()
    with pytest.raises(ImagicError, match="is not a file"):
        export(adapter, "kohya", tmp_path, overwrite=True)
    assert weights.read_bytes() == b"old"
    full = fitted("full")
    (tmp_path / full.name).mkdir()
    (tmp_path / full.name / "unet").touch()
    with pytest.raises(ImagicError, match="unet is not a folder"):
        export(full, "diffusers", tmp_path)


@each("kind", KINDS)
@each("broken", [1, 2, 3])
def test_a_full_disk_leaves_what_was_there(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Format, broken: int
) -> None:
    """Whichever file it is that there is no room for, none of the others is replaced."""
    adapter, write, left = fitted("lora"), AtomicWriter.write, iter(range(1, 9))
    for path in export(adapter, kind, tmp_path):
        path.write_bytes(b"old")
    before = listing(tmp_path)

    def full(self: AtomicWriter, name: str, content: Iterable[bytes | memoryview]) -> None:
        write(self, name, content)
        if next(left) == broken:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AtomicWriter, "write", full)
    with pytest.raises(ImagicError, match="is full"):
        export(adapter, kind, tmp_path, overwrite=True)
    assert listing(tmp_path) == before


@each("error", [KeyboardInterrupt, OSError, PermissionError])
def test_an_interruption_leaves_no_folder_behind(error: type[BaseException], fitted: Fitted, tmp_path: Path) -> None:
    """At any step: only files with their final names are in the output folder."""
    adapter = fitted("lora")

    def exported(clock: Clock) -> None:
        with suppress(ImagicError):
            by_calls(clock, lambda: export(adapter, "kohya", tmp_path, overwrite=True), [(Path, "mkdir"), (Path, "replace"), (os, "rmdir")])

    for clock in every_step(exported, error):
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], f"step {clock.at}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_adapter_is_not_written_into(fitted: Fitted, kind: Format) -> None:
    """Its own page would no longer have its hash."""
    adapter = fitted("lora")
    before = listing(adapter.folder)
    with pytest.raises(ImagicError, match="is a stored adapter"):
        export(adapter, kind, adapter.folder if kind == "kohya" else adapter.folder.parent, overwrite=True)
    assert listing(adapter.folder) == before


def _without(end: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(end)))


def _twin(tensors: dict[str, Tensor]) -> None:
    """Adds a layer whose name differs in a dot only, which kohya's layout writes as an underscore."""
    tensors.update({name.replace("conv_in", "conv.in"): value.clone() for name, value in tensors.items() if "conv_in" in name})


SPOILED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no first matrix": _without("lora_A.weight"),
    "no second matrix": _without("lora_B.weight"),
    "another rank": lambda tensors: tensors.update({name: value[:2] for name, value in tensors.items() if "lora_A" in name}),
    "another tensor": lambda tensors: tensors.update({"unet.conv_in.magnitude": torch.zeros(1)}),
    "another part": lambda tensors: tensors.update({"text_encoder.x.lora_A.weight": torch.zeros(4, 1)}),
    "two layers of one name": _twin,
    "a number": lambda tensors: tensors.update({"unet.x.lora_A.weight": torch.tensor(1.0), "unet.x.lora_B.weight": torch.tensor(1.0)}),
}


@each("change", SPOILED)
def test_layers_that_are_not_ours_are_refused(fitted: Fitted, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rather than written under names that mean something else."""
    tensors = as_lora(["mid_block.attentions.0.proj_in", "conv_in"])
    change(tensors)
    with pytest.raises(ImagicError, match=f"{LORA_FILE} holds"):
        export(forged(tmp_path, fitted("lora"), tensors), "kohya", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command


def test_the_command_says_what_it_wrote(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In JSON and for people, into outputs/export where nothing else is said; what is there already ends with exit code 2."""
    monkeypatch.chdir(tmp_path)
    adapter = fitted("lora")
    command = ["export", adapter.name, "--format", "kohya", "--store", str(adapter.folder.parent)]
    assert cli.main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["name"], answer["format"]) == (adapter.name, "kohya")
    assert answer["files"][0] == str(Path("outputs/export") / f"{adapter.name}.safetensors")
    assert all(Path(file).is_file() for file in answer["files"])
    assert cli.main(command) == 2
    assert "exists" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*command, "--overwrite", "--out", "there"]) == 0
    assert f"there/{adapter.name}.safetensors" in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("mode", "kind", "match"),
    [("full", "kohya", "imagic-lora compress"), ("embedding", "kohya", "holds no weights (mode embedding)"), ("lora", "pickle", "pickle")],
)
def test_the_command_refuses_with_exit_code_2(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: Mode, kind: str, match: str
) -> None:
    """And says what to do."""
    adapter = fitted(mode)
    tokens = ["export", adapter.name, "--format", kind, "--out", str(tmp_path), "--store", str(adapter.folder.parent)]
    assert cli.main(tokens) == 2
    assert match in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
