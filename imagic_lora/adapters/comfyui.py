"""Exports an edit for ComfyUI: the files to merge into its folder, and the workflows that make the edit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..bases.loading.known import EMBEDDED
from ..core.conditioning import Conditioning, concatenate
from ..core.config import EditConfig
from ..core.errors import ImagicError, ImagicWarning
from ..core.tensors import safetensors_pieces
from ..photos.canvas import to_image
from ..photos.png import png
from .adapter import Adapter
from .comfyui_graphs import Family, graph, model_files, reads_photo, strip_etas
from .contents import canvas_size, embedding_tensors, read_canvas, read_embeddings
from .kohya import kohya, metadata
from .readers import check_layers, notes
from .record import SOURCE
from .withheld import require_photo
from .writing import pieces

Encode = Callable[[Sequence[float]], Sequence[Conditioning]]
"""Returns the conditioning of each eta, as ``edit`` computes it with the base's text encoders."""
TABLE = tuple(k / 20 for k in range(31))
"""Etas of the conditionings that are computed for an adapter of ``embed.space input``, besides its own and those of the strip."""
_NODES = Path(__file__).parent / "data" / "imagic_nodes.py"
_OPENCLIP_WIDTH = 1024  # of the embeddings of Stable Diffusion 2; those of FLUX.2 klein are wider
_PAGE = """# {name}, an edit of one photo in ComfyUI

Made by imagic-lora (Imagic, arXiv 2210.09276) for this target prompt:

    {prompt}

with this base:

    {base}

1. Merge this folder into the folder of ComfyUI, so that `models` lies on `models`, and restart ComfyUI. The nodes need no other package.
2. Open the workflow `{name}` (or `{name}-strip`, a strip over eta). The files `{name}.api.json` and `{name}-strip.api.json` are the same
   workflows for ComfyUI's API.
3. The workflow loads the base above from

{models}

   If a file of yours has another name, choose it in the node that loads it.

| file | what it is |
|---|---|
{files}

{mixing}
Eta 0 reproduces the photo, eta 1 is the target prompt itself. The default eta of this edit is {eta:g}. The embeddings are half of the edit:
the LoRA with a text prompt is another picture.

## What differs from `imagic-lora edit`

{differs}
"""

_MIXED = """The node `Imagic conditioning` gives eta * target + (1 - eta) * optimised, with the pooled embedding and the sizes where the
base has them."""
_TABLE_OF = """The fit optimised what the text encoder reads (`--embed.space input`), so that the conditioning of an eta is an output of the
text encoder and no mixture of two others. The node `Imagic conditioning` has those of these etas, and refuses every other:

    {etas}

For more of them: `imagic-lora export {name} --format comfyui --eta FIRST:LAST:STEP`."""


def comfyui_files(adapter: Adapter, encode: Encode | None = None, etas: Sequence[float] = TABLE) -> dict[str, Iterable[bytes | memoryview]]:
    """Returns the files of an export for ComfyUI, by path relative to the folder that is merged into ComfyUI's.

    Warns with what ComfyUI does in another way than an edit by imagic-lora.

    Args:
        adapter: the adapter.
        encode: computes conditionings; for adapters of ``embed.space input`` alone, and called after every check.
        etas: those whose conditionings the files of such an adapter have, each in [0, 2]; its own and those of the strip are added.

    Raises:
        ImagicError: ComfyUI cannot make this edit: the adapter has full weights or a layer that ComfyUI does not read, or ComfyUI has no
            loader for its base; the adapter has vectors of tokens, and there is nothing to encode them with.
    """
    family, name = _checked(adapter, encode), adapter.name
    if reads_photo(adapter.record.config.edit):
        require_photo(adapter, "the workflow loads the photo")
    tensors = kohya(adapter) if adapter.record.parts else {}
    layers = {key.partition(".")[0] for key in tensors}
    check_layers(layers)
    found = _differences(adapter.record.config.edit, family)
    found += [note for note in notes(layers, adapter.record.prompt, family not in ("v1", "klein")) if "sd-scripts" not in note]
    for note in found:
        warnings.warn(note, ImagicWarning, stacklevel=4)
    files: dict[str, Iterable[bytes | memoryview]] = {}
    if tensors:
        files[f"models/loras/{name}.safetensors"] = safetensors_pieces(tensors, metadata(adapter))
    embeddings = _embeddings(adapter, encode, etas)
    files[f"models/imagic/{name}.safetensors"] = safetensors_pieces(embeddings)
    files["custom_nodes/imagic/__init__.py"] = [_NODES.read_bytes()]
    if reads_photo(adapter.record.config.edit):
        files[f"input/{name}.png"] = (
            [png(to_image(read_canvas(adapter).pixels[0]), {})] if adapter.withheld else pieces(adapter.listed(SOURCE))
        )
    for suffix in ("", "-strip"):
        drawn = graph(adapter, family, strip=bool(suffix))
        files[f"user/default/workflows/{name}{suffix}.json"] = [_json(drawn.ui())]
        files[f"{name}{suffix}.api.json"] = [_json(drawn.api())]
    table = embeddings["etas"].tolist() if "etas" in embeddings else []
    return files | {f"{name}.md": [_page(adapter, family, files, found, table)]}


def _embeddings(adapter: Adapter, encode: Encode | None, etas: Sequence[float]) -> dict[str, Tensor]:
    """The tensors that the nodes read: the three embeddings, or ``etas`` and the conditioning of each, and ``null``."""
    stored = read_embeddings(adapter)
    if encode is None:
        return embedding_tensors(stored)
    asked = sorted({*etas, adapter.record.eta, *strip_etas(adapter.record.eta)})
    found = concatenate(
        [Conditioning(one.tokens.float().cpu(), None if one.pooled is None else one.pooled.float().cpu()) for one in encode(asked)]
    )
    extra = {f"target.{name}": value.float() for name, value in stored["target"].extra.items()}
    null = embedding_tensors({"null": Conditioning(stored["null"].tokens, stored["null"].pooled)})
    mixed = {f"mixed.{name}": value for name, value in found.tensors().items()}
    return {"etas": torch.tensor(asked, dtype=torch.float32), **mixed, **extra, **null}


def _checked(adapter: Adapter, encode: Encode | None) -> Family:
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
        raise ImagicError(got, "an adapter of Stable Diffusion 1, 2, XL or 3, or of FLUX.2 klein", "use --format diffusers")
    if bool(target.vectors) != (encode is not None):
        kind = "whose edits need the text encoders of its base" if target.vectors else "whose embeddings are interpolated"
        got = f"adapter {name} of --embed.space {config.embed.space}, {kind}"
        remedy = "give what encodes them, as the command does" if target.vectors else "leave out --eta: the node takes every eta"
        raise ImagicError(got, "conditionings of some etas with --embed.space input, and only there", remedy)
    if "null" not in embeddings:
        got = f"adapter {name} was made for {base}, whose denoiser takes the guidance scale as an input, which ComfyUI does not give it"
        raise ImagicError(got, "a base with classifier-free guidance", "use --format diffusers")
    if target.pooled is not None:
        return "xl" if whole else "sd3"
    if any(part.component == "transformer" for part in adapter.record.parts) or target.tokens.shape[-1] > _OPENCLIP_WIDTH:
        return "klein"
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
        weights = "" if family == "klein" else ", which reads parentheses as weights"
        found.append(f"The negative prompt is encoded by ComfyUI{weights}, and needs the text encoders.")
    if config.scheduler == "base" and family not in ("sd3", "klein"):
        found.append("The workflow samples with euler in place of the base's own scheduler (--scheduler base): details differ.")
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _page(adapter: Adapter, family: Family, files: Mapping[str, Any], found: list[str], etas: Sequence[float]) -> bytes:
    """The page of instructions. User text is placed in indented code blocks, where Markdown has no effect."""
    record, (width, height) = adapter.record, canvas_size(adapter)
    kinds = {
        "models/loras": "the LoRA layers; other programs of kohya's format read them too",
        "models/imagic": "the embeddings, which no other node reads",
        "custom_nodes/imagic": "the nodes",
        "input": "the photo",
        "user/default/workflows": "a workflow for the page of ComfyUI",
        ".": "a workflow for the API",
    }
    rows = [f"| `{file}` | {kinds[str(PurePosixPath(file).parent)]} |" for file in files]
    levels = {"sd3": ", and for Stable Diffusion 3 the noise levels are too", "klein": ", and for FLUX.2 klein the noise levels are too"}
    same = [
        f"The start noise of seed 0 is the same as in `imagic-lora edit`{levels.get(family, '')}.",
        f"The image is the canvas, {width}x{height} pixels: it is neither cropped nor scaled to the size of the photo.",
    ]
    text = _PAGE.format(
        name=adapter.name,
        prompt=json.dumps(record.prompt),
        base=json.dumps(record.base.name),
        models="\n".join(f"    {file}" for file in model_files(adapter, family)),
        mixing=_TABLE_OF.format(etas=", ".join(f"{eta:g}" for eta in etas), name=adapter.name) if etas else _MIXED,
        files="\n".join(rows),
        eta=record.eta,
        differs="\n".join(f"- {note}" for note in [*found, *same]),
    )
    return text.encode()
