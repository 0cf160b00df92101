"""Exports an edit for ComfyUI: the files to merge into its folder, and the workflows that make the edit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..bases.loading.known import EMBEDDED
from ..core.config import EditConfig, Scheduler
from ..core.errors import ImagicError, ImagicWarning
from ..core.tensors import safetensors_pieces
from .adapter import Adapter
from .comfyui_workflow import Graph
from .contents import embedding_tensors, read_canvas, read_embeddings
from .kohya import kohya, metadata
from .readers import check_layers, notes
from .record import SOURCE
from .writing import pieces

Family = Literal["v1", "v2", "xl", "sd3"]
_NODES = Path(__file__).parent / "data" / "imagic_nodes.py"
_CHECKPOINTS = {  # the names under which they are published
    "sd15": "v1-5-pruned-emaonly.safetensors",
    "sd21": "v2-1_768-ema-pruned.safetensors",
    "sdxl": "sd_xl_base_1.0.safetensors",
    "sd3-medium": "sd3_medium.safetensors",
    "sd35-medium": "sd3.5_medium.safetensors",
}
_SAMPLERS: dict[Scheduler, str] = {
    "base": "euler",
    "euler": "euler",
    "ddim": "ddim",
    "dpm++2m": "dpmpp_2m",
    "dpm++2m-sde": "dpmpp_2m_sde",
    "unipc": "uni_pc",
    "lcm": "lcm",
}
_OPENCLIP_WIDTH = 1024  # of the embeddings of Stable Diffusion 2; those of FLUX.2 klein are wider
_PAGE = """# {name}, an edit of one photo in ComfyUI

Made by imagic-lora (Imagic, arXiv 2210.09276) for this target prompt:

    {prompt}

with this base:

    {base}

1. Merge this folder into the folder of ComfyUI, so that `models` lies on `models`, and restart ComfyUI. The nodes need no other package.
2. Open the workflow `{name}` (or `{name}-strip`, a strip over eta). The files `{name}.api.json` and `{name}-strip.api.json` are the same
   workflows for ComfyUI's API.
3. The checkpoint must be the base above. The workflow expects it as

    {checkpoint}

   If yours has another name, choose it in the node Load Checkpoint.

| file | what it is |
|---|---|
{files}

The node `Imagic conditioning` gives eta * target + (1 - eta) * optimised, with the pooled embedding and the sizes where the base has them:
eta 0 reproduces the photo, eta 1 is the target prompt itself. The default eta of this edit is {eta:g}. The embeddings are half of the edit:
the LoRA with a text prompt is another picture.

## What differs from `imagic-lora edit`

{differs}
"""


def comfyui_files(adapter: Adapter) -> dict[str, Iterable[bytes | memoryview]]:
    """Returns the files of an export for ComfyUI, by path relative to the folder that is merged into ComfyUI's.

    Warns with what ComfyUI does in another way than an edit by imagic-lora.

    Raises:
        ImagicError: ComfyUI cannot make this edit: the adapter has full weights, vectors of tokens or a layer that ComfyUI does not read,
            or ComfyUI has no loader for its base.
    """
    family, name = _checked(adapter), adapter.name
    tensors = kohya(adapter) if adapter.record.parts else {}
    layers = {key.partition(".")[0] for key in tensors}
    check_layers(layers)
    found = _differences(adapter.record.config.edit, family)
    found += [note for note in notes(layers, adapter.record.prompt, family != "v1") if "sd-scripts" not in note]
    for note in found:
        warnings.warn(note, ImagicWarning, stacklevel=4)
    lora: dict[str, Iterable[bytes | memoryview]] = {}
    if tensors:
        lora[f"models/loras/{name}.safetensors"] = safetensors_pieces(tensors, metadata(adapter))
    files: dict[str, Iterable[bytes | memoryview]] = {
        **lora,
        f"models/imagic/{name}.safetensors": safetensors_pieces(embedding_tensors(read_embeddings(adapter))),
        "custom_nodes/imagic/__init__.py": [_NODES.read_bytes()],
    }
    if adapter.record.config.edit.start == "image":
        files[f"input/{name}.png"] = pieces(adapter.listed(SOURCE))
    for suffix in ("", "-strip"):
        graph = _graph(adapter, family, strip=bool(suffix))
        files[f"user/default/workflows/{name}{suffix}.json"] = [_json(graph.ui())]
        files[f"{name}{suffix}.api.json"] = [_json(graph.api())]
    return files | {f"{name}.md": [_page(adapter, family, files, found)]}


def _checked(adapter: Adapter) -> Family:
    """Returns the family of an adapter that ComfyUI can use."""
    name, config = adapter.name, adapter.record.config
    if config.method != "imagic":
        got = f"adapter {name} of method {config.method}, which makes images of a prompt and has no embeddings to interpolate"
        raise ImagicError(got, "an adapter of method imagic", "use --format kohya, and write the prompt in ComfyUI")
    if config.tune.mode == "full":
        got = f"adapter {name} holds full weights, and ComfyUI adds LoRA layers to a checkpoint"
        raise ImagicError(got, "an adapter of mode lora or embedding", f"convert it with: imagic-lora compress {name} --rank 16")
    embeddings = read_embeddings(adapter)
    target, base = embeddings["target"], adapter.record.base.name
    whole = "time_ids" in target.extra
    one_clip = target.pooled is not None and not whole and target.pooled.shape[-1] == target.tokens.shape[-1]
    if base in EMBEDDED or one_clip:
        got = f"adapter {name} was made for {base}, a base that ComfyUI has no loader for"
        raise ImagicError(got, "an adapter of Stable Diffusion 1, 2, XL or 3", "use --format diffusers")
    transformer = any(part.component == "transformer" for part in adapter.record.parts)
    if target.pooled is None and (transformer or target.tokens.shape[-1] > _OPENCLIP_WIDTH):
        got = f"adapter {name} was made for {base}, FLUX.2 klein, which the workflow and its nodes do not cover"
        remedy = "use --format kohya for its LoRA alone, or --format diffusers"
        raise ImagicError(got, "an adapter of Stable Diffusion 1, 2, XL or 3", remedy)
    if target.vectors:
        got = (
            f"adapter {name} optimised the vectors of tokens (--embed.space input), which the base's own text encoder encodes for each eta"
        )
        raise ImagicError(got, "embeddings that a node can interpolate", "fit with --embed.space output, or use --format diffusers")
    if "null" not in embeddings:
        got = f"adapter {name} was made for {base}, whose denoiser takes the guidance scale as an input, which ComfyUI does not give it"
        raise ImagicError(got, "a base with classifier-free guidance", "use --format diffusers")
    if target.pooled is not None:
        return "xl" if whole else "sd3"
    return "v2" if target.tokens.shape[-1] == _OPENCLIP_WIDTH else "v1"


def _differences(config: EditConfig, family: Family) -> list[str]:
    """What the workflow does in another way than an edit with these settings, a sentence each."""
    found = []
    if config.start in ("inverted", "flow"):
        found.append(f"ComfyUI has no start {config.start}: the workflow starts from noise and keeps less of the photo.")
    if config.ddim_eta:
        found.append(f"The workflow adds no noise after steps: ddim_eta {config.ddim_eta:g} is left out.")
    if config.guidance_rescale and config.guidance_scale > 1:
        found.append(f"The workflow does not rescale the guidance: guidance_rescale {config.guidance_rescale:g} is left out.")
    if config.negative_prompt and config.guidance_scale > 1:
        found.append("The negative prompt is encoded by ComfyUI, which reads parentheses as weights, and needs the text encoders.")
    if config.scheduler == "base" and family != "sd3":
        found.append("The workflow samples with euler in place of the base's own scheduler (--scheduler base): details differ.")
    return found


def _graph(adapter: Adapter, family: Family, strip: bool) -> Graph:
    """The workflow of the edit with the default eta, or of a strip over eta."""
    name, record = adapter.name, adapter.record
    config, (height, width) = record.config.edit, read_canvas(adapter).pixels.shape[2:]
    graph, file = Graph(), f"{name}.safetensors"
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=_checkpoint(record.base.name))
    model, clip, vae = ((checkpoint, slot) for slot in range(3))
    if record.parts:
        model = (graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0), 0)
    if config.start == "image":
        photo = graph.add("LoadImage", image=f"{name}.png")
        latent = (graph.add("VAEEncode", pixels=(photo, 0), vae=vae), 0)
    else:
        empty = "EmptySD3LatentImage" if family == "sd3" else "EmptyLatentImage"
        latent = (graph.add(empty, width=width, height=height, batch_size=1), 0)
    if strip:
        node = graph.add("ImagicEtaBatch", latent=latent, embeddings=file, eta_from=0.0, eta_to=max(1.0, record.eta), count=5)
        latent = (node, 2)
    else:
        node = graph.add("ImagicConditioning", embeddings=file, eta=record.eta)
    negative = (node, 1)
    if config.negative_prompt and config.guidance_scale > 1:
        negative = (graph.add("CLIPTextEncode", clip=clip, text=config.negative_prompt), 0)
    skipped = config.steps - min(int(config.steps * config.strength), config.steps) if config.start == "image" else 0
    sampled = graph.add(
        "KSamplerAdvanced",
        model=model,
        positive=(node, 0),
        negative=negative,
        latent_image=latent,
        add_noise="enable",
        noise_seed=0,
        steps=config.steps,
        cfg=max(config.guidance_scale, 1.0),
        sampler_name=_SAMPLERS[config.scheduler],
        scheduler="karras" if config.karras_sigmas else "normal",
        start_at_step=skipped,
        end_at_step=10000,
        return_with_leftover_noise="disable",
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=vae)
    graph.add("SaveImage", images=(decoded, 0), filename_prefix=f"{name}-strip" if strip else name)
    return graph


def _checkpoint(base: str) -> str:
    """The file name of a base's checkpoint: as it is published, or as the user's own file is called."""
    if base in _CHECKPOINTS:
        return _CHECKPOINTS[base]
    last = PurePosixPath(base.replace("\\", "/")).name
    return last if last.endswith((".safetensors", ".ckpt")) else f"{last}.safetensors"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _page(adapter: Adapter, family: Family, files: Mapping[str, Any], found: list[str]) -> bytes:
    """The page of instructions. User text is placed in indented code blocks, where Markdown has no effect."""
    record, (height, width) = adapter.record, read_canvas(adapter).pixels.shape[2:]
    kinds = {
        "models/loras": "the LoRA layers; other programs of kohya's format read them too",
        "models/imagic": "the embeddings, which no other node reads",
        "custom_nodes/imagic": "the nodes",
        "input": "the photo",
        "user/default/workflows": "a workflow for the page of ComfyUI",
        ".": "a workflow for the API",
    }
    rows = [f"| `{file}` | {kinds[str(PurePosixPath(file).parent)]} |" for file in files]
    same = [
        "The start noise of seed 0 is the same as in `imagic-lora edit`, and for Stable Diffusion 3 the noise levels are too."
        if family == "sd3"
        else "The start noise of seed 0 is the same as in `imagic-lora edit`.",
        f"The image is the canvas, {width}x{height} pixels: it is neither cropped nor scaled to the size of the photo.",
    ]
    text = _PAGE.format(
        name=adapter.name,
        prompt=json.dumps(record.prompt),
        base=json.dumps(record.base.name),
        checkpoint=json.dumps(_checkpoint(record.base.name)),
        files="\n".join(rows),
        eta=record.eta,
        differs="\n".join(f"- {note}" for note in [*found, *same]),
    )
    return text.encode()
