"""The export for ComfyUI: its nodes run with a stub of the host, its workflows are checked against the definitions of the nodes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from common import PROMPT, Run, each, opened, tiny_config
from safetensors.torch import load_file, save_file
from test_export import as_lora, forged, listing
from tiny import save_tiny_klein, save_tiny_sd3, save_tiny_sdxl

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.comfyui import TABLE
from imagic_lora.adapters.export import export
from imagic_lora.adapters.kohya import kohya
from imagic_lora.adapters.store import Store
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.flow_trajectory import FlowTrajectory
from imagic_lora.sampling.mixing import mixed
from imagic_lora.sampling.opening import encoded
from imagic_lora.training.fit import fit, result

Fitted = Callable[..., Adapter]
FAMILIES = ["sd", "sdxl", "sd3", "klein", "input"]
"""The families, and Stable Diffusion XL with vectors of tokens, whose mixtures are outputs of the text encoders."""
POOLED = ("sdxl", "sd3", "input")
pytestmark = pytest.mark.filterwarnings("ignore:The workflow samples with euler:imagic_lora.core.errors.ImagicWarning")


@pytest.fixture(scope="module")
def made(folder: Path, fitted: Fitted, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Adapter]]:
    """A tiny base of each family, and a LoRA adapter for it."""
    root = tmp_path_factory.mktemp("comfyui")
    bases = {
        "sdxl": save_tiny_sdxl(root / "sdxl-base"),
        "sd3": save_tiny_sd3(root / "sd3-base"),
        "klein": save_tiny_klein(root / "klein-base"),
    }
    found = {"sd": (folder, fitted("lora"))}
    for name, base in (bases | {"input": bases["sdxl"]}).items():
        embed: dict[str, Any] = {
            "tokens": "words" if name in ("sd3", "klein") else "all",
            "space": "input" if name == "input" else "output",
        }
        size = {"resolution": 64} if name == "klein" else {}  # no config of it says that the tiny one is small
        run = tiny_config(base, tune={"targets": "attention"}, embed=embed, monitoring={"convergence_every": 0}, **size)
        adapter = result(fit(photo_file, PROMPT, run, Store(root), name))
        assert adapter is not None
        found[name] = base, adapter
    return found


def host(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The written nodes, imported as ComfyUI imports them, with its module ``folder_paths``."""
    paths: dict[str, tuple[list[str], set[str]]] = {}

    def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
        if name in paths:
            paths[name][0].append(path)
        else:
            paths[name] = [path], set()

    def get_filename_list(name: str) -> list[str]:
        return sorted(str(file.relative_to(path)) for path in paths[name][0] for file in Path(path).rglob("*") if file.is_file())

    def get_full_path(name: str, file: str) -> str | None:
        return next((str(Path(path) / file) for path in paths[name][0] if (Path(path) / file).is_file()), None)

    stub: Any = ModuleType("folder_paths")
    stub.models_dir = str(root / "models")
    stub.add_model_folder_path, stub.get_filename_list, stub.get_full_path = add_model_folder_path, get_filename_list, get_full_path
    monkeypatch.setitem(sys.modules, "folder_paths", stub)
    for name in [name for name in sys.modules if name.startswith("imagic_lora")]:  # the nodes need nothing of ours
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("comfyui_custom_node", root / "custom_nodes/imagic/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_node(nodes: ModuleType, kind: str, **inputs: Any) -> tuple[Any, ...]:
    """Runs a node as ComfyUI does: with every input that it asks for, by name."""
    node = nodes.NODE_CLASS_MAPPINGS[kind]
    assert set(inputs) == set(node.INPUT_TYPES()["required"])
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return outputs


def exported(adapter: Adapter, folder: Path, etas: Sequence[float] = TABLE) -> list[Path]:
    """The files of an export, as the command writes them."""
    vectors, stored = adapter.record.config.embed.space == "input", Store(adapter.folder.parent).read(adapter.name)
    return export(adapter, "comfyui", folder, encode=partial(encoded, stored) if vectors else None, etas=etas)


# What the nodes give


@pytest.mark.slow
@each("family", FAMILIES)
def test_a_conditioning_is_that_of_our_edit(made: dict[str, tuple[Path, Adapter]], tmp_path: Path, family: str) -> None:
    """Tokens, pooled embedding and sizes, at every eta, alone and in a batch; the negative one is that of the empty prompt."""
    folder, adapter = made[family]
    base, etas = opened(folder), [0.0, 0.35, 0.7, 1.05, 1.4]
    stored = Editor(base).conditionings(adapter)
    padding = adapter.record.config.edit.padding_eta
    ours = [mixed(base, PROMPT, stored["target"], stored["optimised"], eta, padding) for eta in etas]
    assert (ours[0].tokens - ours[2].tokens).abs().max() > 1e-3
    root = exported(adapter, tmp_path)[-1].parent
    latent = {"samples": torch.zeros(1, 4, 8, 8), "noise_mask": torch.ones(1, 8, 8)}
    with pytest.MonkeyPatch.context() as patch:
        nodes, file = host(root, patch), f"{adapter.name}.safetensors"
        singles = [run_node(nodes, "ImagicConditioning", embeddings=file, eta=eta) for eta in etas]
        strip = run_node(nodes, "ImagicEtaBatch", embeddings=file, latent=latent, eta_from=0.0, eta_to=1.4, count=5)
    for k, (expected, (positive, negative)) in enumerate(zip(ours, singles, strict=True)):
        ((tokens, extra),), ((null, null_extra),) = positive, negative
        torch.testing.assert_close(tokens, expected.tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(strip[0][0][0][k : k + 1], expected.tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(null, stored["null"].tokens, rtol=0, atol=1e-5)
        assert ("pooled_output" in extra) == (family in POOLED) == ("pooled_output" in null_extra)
        if expected.pooled is not None:
            torch.testing.assert_close(extra["pooled_output"], expected.pooled, rtol=0, atol=1e-5)
            torch.testing.assert_close(strip[0][0][1]["pooled_output"][k : k + 1], expected.pooled, rtol=0, atol=1e-5)
            torch.testing.assert_close(null_extra["pooled_output"], stored["null"].pooled, rtol=0, atol=1e-5)
        sizes = {"width": 32, "height": 24, "crop_w": 0, "crop_h": 0, "target_width": 32, "target_height": 24}
        assert {name: extra.get(name) for name in sizes} == (sizes if family in ("sdxl", "input") else dict.fromkeys(sizes))
    repeated = strip[2]
    assert repeated["samples"].shape == (5, 4, 8, 8)
    assert repeated["noise_mask"].shape == (5, 8, 8)
    assert repeated["batch_index"] == [0] * 5  # ComfyUI draws the noise of each from its index


def test_a_mixture_that_was_not_encoded_is_refused(made: dict[str, tuple[Path, Adapter]], tmp_path: Path) -> None:
    """Between two etas of a table nothing is interpolated: the node names those that it has. Its own and the strip's are always there."""
    adapter = changed(made["input"][1], eta=0.63)
    root = exported(adapter, tmp_path, etas=[0.4, 1.2])[-1].parent
    text = (root / f"{adapter.name}.md").read_text()
    assert "    0, 0.25, 0.4, 0.5, 0.63, 0.75, 1, 1.2\n" in text
    with pytest.MonkeyPatch.context() as patch:
        nodes, file = host(root, patch), f"{adapter.name}.safetensors"
        for eta in (0.63, 0.6304, 1.2):
            run_node(nodes, "ImagicConditioning", embeddings=file, eta=eta)
        with pytest.raises(ValueError, match=r"no conditioning for eta 0.65. Expected: one of 0, 0.25, 0.4, .*--eta"):
            run_node(nodes, "ImagicConditioning", embeddings=file, eta=0.65)
        with pytest.raises(ValueError, match=r"no conditioning for eta 0.3"):
            run_node(
                nodes, "ImagicEtaBatch", embeddings=file, latent={"samples": torch.zeros(1, 4, 8, 8)}, eta_from=0.0, eta_to=1.2, count=5
            )


def test_the_command_encodes_what_only_the_base_can(made: dict[str, tuple[Path, Adapter]], tmp_path: Path, run: Run) -> None:
    """For vectors of tokens it loads the base; --eta is refused where it says nothing, and out of range."""
    for family, flags, expected in (
        ("input", ("--format", "comfyui", "--eta", "0.4,0.9"), None),
        ("sdxl", ("--format", "comfyui", "--eta", "0.4"), "the node takes every eta"),
        ("input", ("--format", "kohya", "--eta", "0.4"), "--eta together with --format kohya"),
        ("input", ("--format", "comfyui", "--eta", "2.5"), "--eta 2.5"),
    ):
        adapter = made[family][1]
        code, out, err = run("export", adapter.name, *flags, "--store", adapter.folder.parent, "--out", tmp_path / "out")
        assert (code, out) == ((2, "") if expected else (0, "")), err
        assert expected is None or expected in err
    file = tmp_path / "out" / adapter.name / "models/imagic" / f"{adapter.name}.safetensors"
    assert load_file(file)["etas"].tolist() == pytest.approx([0.0, 0.25, 0.4, 0.5, 0.7, 0.75, 0.9, 1.0])


def test_a_node_refuses_what_it_cannot_use(made: dict[str, tuple[Path, Adapter]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file, a missing one, several latents; a file that was written again is read again."""
    adapter = made["sd"][1]
    root = export(adapter, "comfyui", tmp_path)[-1].parent
    save_file({"emb_params": torch.zeros(1, 8)}, root / "models/imagic/other.safetensors")
    (root / "models/imagic/notes.txt").touch()
    nodes, file = host(root, monkeypatch), f"{adapter.name}.safetensors"
    node = nodes.NODE_CLASS_MAPPINGS["ImagicConditioning"]
    assert node.INPUT_TYPES()["required"]["embeddings"] == ([file, "other.safetensors"],)
    assert node.IS_CHANGED(embeddings=file, eta=0.5) == (root / "models/imagic" / file).stat().st_mtime
    with pytest.raises(ValueError, match=r"other\.safetensors holds no null\.tokens, optimised\.tokens, target\.tokens"):
        node().run("other.safetensors", 0.5)
    with pytest.raises(FileNotFoundError, match="copy it there"):
        node().run("none.safetensors", 0.5)
    with pytest.raises(ValueError, match="got 2 latents"):
        nodes.NODE_CLASS_MAPPINGS["ImagicEtaBatch"]().run(file, {"samples": torch.zeros(2, 4, 8, 8)}, 0.0, 1.0, 3)


# The workflow

SAMPLERS = ["euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm"]
INT, FLOAT, STRING = ("INT",), ("FLOAT",), ("STRING",)
SIZE = {"width": INT, "height": INT, "batch_size": INT}


def core(name: str, file: str) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Inputs, in order, and outputs of ComfyUI's own nodes, as its nodes.py and the files nodes_sd3.py, nodes_flux.py,
    nodes_edit_model.py and nodes_custom_sampler.py of comfy_extras have them."""
    sampler = {
        "model": ("MODEL",), "add_noise": (["enable", "disable"],), "noise_seed": INT, "steps": INT, "cfg": FLOAT,
        "sampler_name": (SAMPLERS,), "scheduler": (["normal", "karras"],), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",),
        "latent_image": ("LATENT",), "start_at_step": INT, "end_at_step": INT, "return_with_leftover_noise": (["disable", "enable"],),
    }  # fmt: skip
    return {
        "CheckpointLoaderSimple": ({"ckpt_name": STRING}, ("MODEL", "CLIP", "VAE")),
        "LoraLoaderModelOnly": ({"model": ("MODEL",), "lora_name": ([file],), "strength_model": FLOAT}, ("MODEL",)),
        "CLIPTextEncode": ({"text": STRING, "clip": ("CLIP",)}, ("CONDITIONING",)),
        "EmptyLatentImage": (SIZE, ("LATENT",)),
        "EmptySD3LatentImage": (SIZE, ("LATENT",)),
        "EmptyFlux2LatentImage": (SIZE, ("LATENT",)),
        "UNETLoader": ({"unet_name": STRING, "weight_dtype": (["default", "fp8_e4m3fn"],)}, ("MODEL",)),
        "VAELoader": ({"vae_name": STRING}, ("VAE",)),
        "CLIPLoader": ({"clip_name": STRING, "type": (["sdxl", "flux2"],), "device": (["default", "cpu"],)}, ("CLIP",)),
        "ReferenceLatent": ({"conditioning": ("CONDITIONING",), "latent": ("LATENT",)}, ("CONDITIONING",)),
        "CFGGuider": ({"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "cfg": FLOAT}, ("GUIDER",)),
        "RandomNoise": ({"noise_seed": INT}, ("NOISE",)),
        "KSamplerSelect": ({"sampler_name": (SAMPLERS,)}, ("SAMPLER",)),
        "Flux2Scheduler": ({"steps": INT, "width": INT, "height": INT}, ("SIGMAS",)),
        "SplitSigmas": ({"sigmas": ("SIGMAS",), "step": INT}, ("SIGMAS", "SIGMAS")),
        "SamplerCustomAdvanced": (
            {"noise": ("NOISE",), "guider": ("GUIDER",), "sampler": ("SAMPLER",), "sigmas": ("SIGMAS",), "latent_image": ("LATENT",)},
            ("LATENT", "LATENT"),
        ),
        "LoadImage": ({"image": ([f"{name}.png"],)}, ("IMAGE", "MASK")),
        "VAEEncode": ({"pixels": ("IMAGE",), "vae": ("VAE",)}, ("LATENT",)),
        "VAEDecode": ({"samples": ("LATENT",), "vae": ("VAE",)}, ("IMAGE",)),
        "SaveImage": ({"images": ("IMAGE",), "filename_prefix": STRING}, ()),
        "KSamplerAdvanced": (sampler, ("LATENT",)),
    }


def check_api(workflow: dict[str, Any], definitions: dict[str, Any]) -> None:
    """As ComfyUI validates a prompt: every input is there, linked to an output of its type or a value that it takes."""
    for node in workflow.values():
        inputs = definitions[node["class_type"]][0]
        assert set(node["inputs"]) == set(inputs)
        for name, (kind, *_) in inputs.items():
            given = node["inputs"][name]
            if isinstance(given, list):
                source, slot = given
                assert definitions[workflow[source]["class_type"]][1][slot] == kind
            elif isinstance(kind, list):
                assert given in kind
            else:
                assert type(given) in {"INT": (int,), "FLOAT": (float, int), "STRING": (str,)}[kind], (name, given)


def check_ui(page: dict[str, Any], workflow: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Links are consistent at both ends, and nodes, links and values are those of the form for the API."""
    nodes, links = {node["id"]: node for node in page["nodes"]}, {link[0]: link for link in page["links"]}
    assert (page["version"], page["last_node_id"], page["last_link_id"]) == (0.4, max(nodes), max(links))
    assert {str(number): node["type"] for number, node in nodes.items()} == {k: node["class_type"] for k, node in workflow.items()}
    ends = set()
    for number, node in nodes.items():
        inputs, outputs = definitions[node["type"]]
        given = workflow[str(number)]["inputs"]
        assert tuple(output["type"] for output in node["outputs"]) == outputs
        for slot, entry in enumerate(node["inputs"]):
            _, source, from_slot, to, to_slot, kind = links[entry["link"]]
            assert (to, to_slot, kind, (kind,)) == (number, slot, entry["type"], inputs[entry["name"]])
            assert given[entry["name"]] == [str(source), from_slot]
            assert entry["link"] in nodes[source]["outputs"][from_slot]["links"]
            ends.add(entry["link"])
        assert all(links[link][1:3] == [number, slot] for slot, output in enumerate(node["outputs"]) for link in output["links"])
        values = [value for name, value in given.items() if name in inputs and not isinstance(value, list)]
        widgets = list(node["widgets_values"])
        if node["type"] in ("KSamplerAdvanced", "RandomNoise"):
            assert widgets.pop(2 if node["type"] == "KSamplerAdvanced" else 1) == "fixed"  # control_after_generate follows the seed
        if node["type"] == "LoadImage":
            assert widgets.pop(1) == "image"
        in_order = [given[name] for name in inputs if not isinstance(given[name], list)]
        assert widgets == in_order
        assert len(values) == len(in_order)
    assert ends == set(links)
    assert len({tuple(node["pos"]) for node in nodes.values()}) == len(nodes)


def changed(adapter: Adapter, mode: str | None = None, eta: float | None = None, **edit: Any) -> Adapter:
    """The adapter with other settings of the edit."""
    record = adapter.record
    config = record.config.model_copy(update={"edit": record.config.edit.model_copy(update=edit)} | ({"eta": eta} if eta else {}))
    changes: dict[str, Any] = {"config": config} | ({"parts": []} if mode == "embedding" else {})
    return Adapter(adapter.folder, record.model_copy(update=changes))


@each("family, edit, mode", [
    *[(family, {}, None) for family in FAMILIES if family != "input"],  # pytest.warns would repeat what loading its base warns of
    ("sd3", {}, "embedding"),
    ("sd", {"start": "image", "steps": 50, "strength": 0.65, "scheduler": "dpm++2m", "karras_sigmas": True}, None),
    ("sdxl", {"negative_prompt": "blurry", "scheduler": "unipc"}, "embedding"),
    ("klein", {"negative_prompt": "blurry", "start": "image", "steps": 50, "strength": 0.65, "reference": True}, None),
])  # fmt: skip
def test_a_workflow_is_valid_in_both_forms(
    made: dict[str, tuple[Path, Adapter]], tmp_path: Path, family: str, edit: dict[str, Any], mode: str | None
) -> None:
    """Against the definitions of ComfyUI's nodes and those that the written nodes give themselves; every file it names is there."""
    adapter = changed(made[family][1], mode, **edit)
    name, config, flow = adapter.name, adapter.record.config.edit, family in ("sd3", "klein")
    with pytest.warns(ImagicWarning) if edit.get("negative_prompt") or (not flow and "scheduler" not in edit) else nullcontext():
        paths = exported(adapter, tmp_path)
    root = paths[-1].parent
    with pytest.MonkeyPatch.context() as patch:
        nodes = host(root, patch)
        own = {kind: (node.INPUT_TYPES()["required"], node.RETURN_TYPES) for kind, node in nodes.NODE_CLASS_MAPPINGS.items()}
    definitions = core(name, f"{name}.safetensors") | own
    for suffix in ("", "-strip"):
        api = json.loads((root / f"{name}{suffix}.api.json").read_text())
        check_api(api, definitions)
        check_ui(json.loads((root / f"user/default/workflows/{name}{suffix}.json").read_text()), api, definitions)
        kinds = [node["class_type"] for node in api.values()]
        assert ("LoraLoaderModelOnly" in kinds) == (root / f"models/loras/{name}.safetensors").exists() == (mode != "embedding")
        assert ("LoadImage" in kinds) == (root / f"input/{name}.png").exists() == (config.start == "image")
        assert ("EmptySD3LatentImage" in kinds) == (family == "sd3")
        assert ("EmptyFlux2LatentImage" in kinds) == (family == "klein" and config.start == "noise")
        assert ("CLIPTextEncode" in kinds) == bool(config.negative_prompt)
        assert ("CLIPLoader" in kinds) == (family == "klein" and bool(config.negative_prompt))
        assert kinds.count("ReferenceLatent") == 2 * config.reference
        given = {name: value for node in api.values() for name, value in node["inputs"].items()}
        assert (given["steps"], given["cfg"]) == (config.steps, config.guidance_scale)
        assert given.get("step", given.get("start_at_step", 0)) == (50 - 32 if config.start == "image" else 0)
        page = (root / f"{name}.md").read_text()
        models = [given[key] for key in ("ckpt_name", "unet_name", "vae_name", "clip_name") if key in given]
        assert all(f"/{model}\n" in page for model in models)
    (node,) = [node["inputs"] for node in json.loads((root / f"{name}.api.json").read_text()).values() if "eta" in node["inputs"]]
    assert node["eta"] == adapter.record.eta


def test_the_levels_of_a_flow_are_those_of_the_workflow(made: dict[str, tuple[Path, Adapter]]) -> None:
    """ComfyUI's scheduler normal for Stable Diffusion 3: the first and last of a thousand shifted levels, evenly spaced, shifted again."""
    base = opened(made["sd3"][0])

    def shifted(level: float) -> float:
        return 3.0 * level / (1 + 2.0 * level)

    last = shifted(1 / 1000)
    expected = [shifted(1.0 + (last - 1.0) * k / 27) for k in range(28)]
    assert FlowTrajectory(base, 28, 64).sigmas == pytest.approx([*expected, 0.0], abs=1e-6)


def test_the_levels_of_klein_are_those_of_the_workflow(made: dict[str, tuple[Path, Adapter]]) -> None:
    """Flux2Scheduler: evenly spaced from 1 to 0, shifted by a number that follows from the size of the image and the steps."""
    base, (width, height), steps = opened(made["klein"][0]), (64, 48), 50
    positions = round(width * height / 256)
    at_200, at_10 = 0.00016927 * positions + 0.45666666, 8.73809524e-05 * positions + 1.89833333
    slope = (at_200 - at_10) / 190.0
    shift = math.exp(slope * steps + at_200 - 200.0 * slope)
    expected = [shift / (shift + 1 / (1 - k / steps) - 1) for k in range(steps)]
    assert FlowTrajectory(base, steps, (width // 16) * (height // 16)).sigmas == pytest.approx([*expected, 0.0], abs=1e-6)


def test_comfyui_reads_every_layer_of_klein(made: dict[str, tuple[Path, Adapter]], tmp_path: Path) -> None:
    """ComfyUI's table of the layers of FLUX.2 in diffusers (flux_to_diffusers in comfy/utils.py), with underscores for dots."""
    double = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
              "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")  # fmt: skip
    single = ("attn.to_qkv_mlp_proj", "attn.to_out")
    known = {f"transformer_blocks.0.{end}" for end in double} | {f"single_transformer_blocks.{k}.{end}" for k in (0, 1) for end in single}
    written = load_file(exported(made["klein"][1], tmp_path)[0])
    layers = {key.partition(".")[0] for key in written}
    assert layers <= {f"lora_transformer_{layer.replace('.', '_')}" for layer in known}
    assert {
        "lora_transformer_single_transformer_blocks_1_attn_to_qkv_mlp_proj",
        "lora_transformer_transformer_blocks_0_attn_to_q",
    } <= layers


# What is in the folder, and what is refused


@each("family", FAMILIES)
def test_the_lora_is_that_of_kohya_s_format(made: dict[str, tuple[Path, Adapter]], tmp_path: Path, family: str) -> None:
    """The names that ComfyUI reads."""
    adapter = made[family][1]
    written = load_file(exported(adapter, tmp_path)[0])
    expected = kohya(adapter)
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in written.items())


def test_the_page_names_every_file_and_what_differs(made: dict[str, tuple[Path, Adapter]], tmp_path: Path) -> None:
    """Each difference is a warning too."""
    adapter = changed(made["sd"][1], start="inverted", ddim_eta=0.5, guidance_rescale=0.7)
    with pytest.warns(ImagicWarning) as caught:
        paths = export(adapter, "comfyui", tmp_path)
    text = paths[-1].read_text()
    assert f"    {json.dumps(PROMPT)}\n" in text
    assert all(f"| `{path.relative_to(paths[-1].parent).as_posix()}` |" in text for path in paths[:-1])
    said = [str(warning.message) for warning in caught]
    assert [
        word for word in ("start inverted", "ddim_eta 0.5", "guidance_rescale 0.7", "euler") if not any(word in one for one in said)
    ] == []
    assert all(one in text for one in said)


def test_what_comfyui_cannot_do_is_refused(fitted: Fitted, tmp_path: Path, run: Run) -> None:
    """Full weights, bases without a loader, no null: exit code 2 with one message, and nothing is written. Vectors with no encoder."""
    real = fitted("lora")
    vectors = real.record.config.model_copy(update={"embed": real.record.config.embed.model_copy(update={"space": "input"})})
    of_vectors = Adapter(real.folder, real.record.model_copy(update={"config": vectors}))
    subject = real.record.config.model_copy(update={"method": "dreambooth"})
    of_subject = Adapter(real.folder, real.record.model_copy(update={"config": subject}))
    layers = as_lora(["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])

    def made(name: str, source: Adapter, target: Conditioning) -> tuple[Path, str]:
        (tmp_path / name).mkdir()
        return tmp_path / name, forged(tmp_path / name, source, layers, target).name

    tokens = torch.zeros(1, 2, 8)
    cases = {
        "imagic-lora compress": (fitted("full").folder.parent, fitted("full").name),
        "--format kohya, and write the prompt": made("subject", of_subject, Conditioning(tokens)),
        "critters, a base that ComfyUI has no loader for": (Path(__file__).parents[2] / "adapters", "rex-jumps"),
        "a base that ComfyUI has no loader for": made("clip", real, Conditioning(tokens, torch.zeros(1, 8))),
        "takes the guidance scale as an input": made("lcm", real, Conditioning(tokens)),
    }
    for expected, (store, name) in cases.items():
        code, out, err = run("export", name, "--format", "comfyui", "--store", store, "--out", tmp_path / "out")
        assert (code, out) == (2, ""), err
        assert expected in err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
    vectors_only = made("vectors", of_vectors, Conditioning(tokens, vectors={"text_encoder": torch.zeros(1, 2, 8)}))
    with pytest.raises(ImagicError, match="need the text encoders of its base"):
        export(Store(vectors_only[0]).read(vectors_only[1]), "comfyui", tmp_path / "out")


def test_files_that_are_there_stay(made: dict[str, tuple[Path, Adapter]], tmp_path: Path) -> None:
    """Unless they are to be replaced; a file in place of a folder is named before anything is written."""
    adapter = made["sd3"][1]
    first = export(adapter, "comfyui", tmp_path)
    before = listing(tmp_path)
    first[0].write_bytes(b"mine")
    with pytest.raises(ImagicError, match=r"exists\. Expected: a new file"):
        export(adapter, "comfyui", tmp_path)
    assert first[0].read_bytes() == b"mine"
    assert export(adapter, "comfyui", tmp_path, overwrite=True) == first
    assert listing(tmp_path) == before
    (tmp_path / "other" / adapter.name).mkdir(parents=True)
    (tmp_path / "other" / adapter.name / "models").touch()
    with pytest.raises(ImagicError, match="models is not a folder"):
        export(adapter, "comfyui", tmp_path / "other")
