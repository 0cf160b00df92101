"""An adapter for other programs: in the layout of kohya's scripts, which ComfyUI and A1111 read, or in that of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces
from .adapter import Adapter
from .atomic import AtomicWriter, writable
from .contents import read_canvas, read_embeddings
from .lora import LORA_FILE
from .record import CARD, EMBEDDINGS, RECORD

Format = Literal["kohya", "diffusers"]
Files = Mapping[str, Iterable[bytes | memoryview]]
_PIECE = 2**24  # bytes that are copied at once
_REMEDY = "fit or copy the adapter again"
_OPENCLIP = 1024  # width of the embeddings of Stable Diffusion 2
_STABILITY = "https://github.com/Stability-AI/generative-models"
_LAYER = re.compile(
    r"(?P<side>down_blocks|mid_block|up_blocks)(\.(?P<level>[0-9]+))?"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>[0-9]+)\.(?P<rest>.+)"
)
_INSIDE = {
    "resnets": {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_USE = {
    "kohya": "`{name}.safetensors` goes where ComfyUI or A1111 look for LoRA files, and is used at strength 1.",
    "lora": "`pipe.load_lora_weights` takes this folder.",
    "full": "`UNet2DConditionModel.from_pretrained` takes the folder `unet`.",
}
_PAGE = """# {name}, an edit of one photo

Made by imagic-lora (Imagic, arXiv 2210.09276) for this sentence:

    {prompt}

on this base:

    {base}

## The weights

{use}

## The embeddings

The weights are half of the edit. The other half is in `{embeddings}`, which holds these tensors:

{tensors}

`target` is of the sentence, `optimised` of the photo, `null` of the empty sentence. What the model is given in place of a prompt is

    eta * target + (1 - eta) * optimised

of `tokens`, and of `pooled` where there is one. Eta 0 gives the photo back, and 1 is the sentence as it is: a program that takes no
embeddings can do that one, with the sentence as its prompt. This edit was made for eta {eta:g}.

With diffusers the mix of `tokens` is `prompt_embeds`, and `null` is `negative_prompt_embeds`. Of SDXL there are also `pooled`, which is
`pooled_prompt_embeds`, and `time_ids`, the six numbers of `original_size`, `crops_coords_top_left` and `target_size`.

Pictures were sampled in {steps} steps at guidance {guidance:g}, from start {start}.
"""


def export(adapter: Adapter, kind: Format, folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes an adapter's weights, its embeddings and a page on how to use them; nothing is put in place before all is written.

    Args:
        kind: ``kohya`` writes ``NAME.safetensors`` and two files beside it, ``diffusers`` a folder ``NAME``.
        overwrite: files of the same names.

    Returns:
        The files, the weights first.

    Raises:
        ImagicError: full weights in the layout of kohya's scripts, which has none; a file that is there already, or cannot be written;
            an adapter that is broken.
    """
    files = _for_kohya(adapter) if kind == "kohya" else _for_diffusers(adapter)
    folder = folder if kind == "kohya" else folder / adapter.name
    paths = [folder / name for name in files]
    if (folder / RECORD).exists():
        raise ImagicError(f"{folder} is a stored adapter", "a folder of its own for what is exported", "choose another --out")
    if (taken := [path for path in paths if path.exists()]) and not overwrite:
        raise ImagicError(f"{taken[0]} exists", "a new file", "choose another --out, or --overwrite")
    with writable(folder), TemporaryDirectory(prefix=".export-", dir=folder) as hidden:
        made = AtomicWriter(Path(hidden))
        for name, content in files.items():
            made.write(name, content)
        for name, path in zip(files, paths, strict=True):  # only now that nothing can be refused any more
            path.parent.mkdir(exist_ok=True)
            (made.folder / name).replace(path)
    return paths


def _for_kohya(adapter: Adapter) -> Files:
    name = adapter.name
    if adapter.record.config.tune.mode == "full":
        got = f"adapter {name} holds a whole denoiser, and kohya's layout LoRA layers alone"
        raise ImagicError(got, "a LoRA adapter", f"imagic-lora compress {name} --rank 16 makes one of it; or use --format diffusers")
    embeddings = f"{name}.embeddings.safetensors"
    return {
        f"{name}.safetensors": safetensors_pieces(kohya(adapter), _metadata(adapter)),
        embeddings: _pieces(adapter.listed(EMBEDDINGS)),
        f"{name}.md": [_page(adapter, _USE["kohya"].format(name=name), embeddings)],
    }


def _for_diffusers(adapter: Adapter) -> Files:
    files = [file for part in adapter.record.parts for file in part.files]
    page = _page(adapter, _USE[adapter.record.config.tune.mode], EMBEDDINGS)
    return {file: _pieces(adapter.listed(file)) for file in (*files, EMBEDDINGS)} | {CARD: [page]}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _page(adapter: Adapter, use: str, embeddings: str) -> bytes:
    """What there is and how it is used; text from outside stands in indented blocks, where Markdown means nothing."""
    record = adapter.record
    held = {f"{kind}.{name}": tuple(one.shape) for kind, c in read_embeddings(adapter).items() for name, one in c.tensors().items()}
    text = _PAGE.format(
        name=adapter.name,
        prompt=json.dumps(record.prompt),
        base=json.dumps(record.base.name),
        use=use,
        embeddings=embeddings,
        tensors="\n".join(f"- `{name}` {list(shape)}" for name, shape in sorted(held.items())),
        eta=record.config.eta,
        steps=record.config.edit.steps,
        guidance=record.config.edit.guidance_scale,
        start=record.config.edit.start,
    )
    return text.encode()


def kohya(adapter: Adapter) -> dict[str, Tensor]:
    """The LoRA layers under the names that kohya's scripts give them: ``lora_unet_`` and the name of the layer, dots made underscores.

    Those scripts name the layers of Stable Diffusion 1 and 2 as diffusers does, and those of SDXL as Stability's own code does. Readers
    multiply by alpha over rank, and some take alpha for the rank: the scale goes into the second matrix, and alpha is the rank.

    Raises:
        ImagicError: the file holds something else than LoRA layers of the recorded rank.
    """
    path, tune = adapter.listed(LORA_FILE), adapter.record.config.tune
    held, scale = read(path), 1.0 if tune.alpha is None else tune.alpha / tune.rank
    layers = sorted({name.removeprefix("unet.").rpartition(".lora_")[0] for name in held})
    names = original_names(layers) if _version(adapter) == "xl" else {layer: layer for layer in layers}
    found: dict[str, Tensor] = {}
    for layer, name in names.items():
        down, up = (held.pop(f"unet.{layer}.lora_{matrix}.weight", None) for matrix in "AB")
        if down is None or up is None or down.shape[:1] != (tune.rank,) or up.shape[1:2] != (tune.rank,):
            raise ImagicError(
                f"{path} holds no two matrices of rank {tune.rank} for {layer[:80]!r}", "a LoRA file as fit writes it", _REMEDY
            )
        key = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale, f"{key}.alpha": torch.tensor(float(tune.rank))}
    if held:
        raise ImagicError(f"{path} holds {next(iter(held))[:80]!r}", "LoRA layers alone", _REMEDY)
    return found


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """The names of a U-Net's layers in Stability's own code, by those in diffusers.

    That code counts in one row what diffusers sorts into levels: on the way down the first convolution, then of each level the residual
    blocks and the downsampler; on the way up the residual blocks, of which a level has one more. A block's attention comes after it, and
    an upsampler after the last block of its level.

    Args:
        layers: those of every attention among them, and by that the number of blocks.

    Raises:
        ImagicError: a layer that is no part of such a U-Net.
    """
    found = {layer: _LAYER.fullmatch(layer) for layer in layers}
    ups = [match for match in found.values() if match and match["side"] == "up_blocks" and match["kind"] in ("resnets", "attentions")]
    level = 1 + max((int(match["index"]) for match in ups), default=0)
    attended = {match["level"] for match in ups if match["kind"] == "attentions"}
    names: dict[str, str] = {}
    for layer, match in found.items():
        if match is None:
            name = _OUTSIDE.get(layer)
        else:
            rest = match["rest"] if match["kind"] == "attentions" else _INSIDE[match["kind"]].get(match["rest"])
            name = rest and f"{_block(match, level, match['level'] in attended)}.{rest}"
        if name is None:
            raise ImagicError(f"a LoRA layer on {layer[:80]!r}", "the layers of the U-Net of SDXL", "use --format diffusers")
        names[layer] = name
    return names


def _block(match: re.Match[str], level: int, attended: bool) -> str:
    """The block of a layer and the place in it.

    Args:
        level: blocks of a level.
        attended: its level has attention.
    """
    first, index, place = int(match["level"] or 0) * level, int(match["index"]), int(match["kind"] == "attentions")
    if match["side"] == "mid_block":
        return f"middle_block.{2 * index + place}"
    if match["kind"] == "downsamplers":
        return f"input_blocks.{first + level}.0"
    if match["kind"] == "upsamplers":
        return f"output_blocks.{first + level - 1}.{1 + attended}"
    return f"input_blocks.{1 + first + index}.{place}" if match["side"] == "down_blocks" else f"output_blocks.{first + index}.{place}"


def _version(adapter: Adapter) -> Literal["v1", "v2", "xl"]:
    """Of Stable Diffusion, as its embeddings tell."""
    target = read_embeddings(adapter)["target"]
    if target.pooled is not None:
        return "xl"
    return "v2" if target.tokens.shape[-1] == _OPENCLIP else "v1"


def _metadata(adapter: Adapter) -> dict[str, str]:
    """What readers show: Stability's model specification, and the settings under the names of kohya's scripts."""
    record, tune, version = adapter.record, adapter.record.config.tune, _version(adapter)
    high, wide = read_canvas(adapter).pixels.shape[2:]
    second = "v2-768-v" if high * wide > 512 * 512 else "v2-512"  # a guess: what the base predicts is not on record
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{ {'v1': 'v1', 'v2': second, 'xl': 'xl-v1-base'}[version] }/lora",
        "modelspec.implementation": _STABILITY if version == "xl" else "diffusers",
        "modelspec.title": adapter.name,
        "modelspec.resolution": f"{wide}x{high}",
        "modelspec.description": record.prompt,
        "modelspec.date": record.created,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(tune.rank),
        "ss_network_alpha": str(float(tune.rank)),
        "ss_base_model_version": {"v1": "sd_v1", "v2": "sd_v2", "xl": "sdxl_base_v1-0"}[version],
        "ss_v2": str(version == "v2"),
        "ss_sd_model_name": record.base.name,
        "ss_output_name": adapter.name,
        "ss_num_train_images": "1",
        "ss_resolution": f"({wide}, {high})",
        "ss_steps": str(tune.steps),
        "ss_learning_rate": str(tune.learning_rate),
        "ss_seed": str(record.config.seed),
    }
