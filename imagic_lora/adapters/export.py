"""Exports an adapter for other programs: for ComfyUI as a whole, in the format of kohya's scripts, or in that of diffusers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..core.config import Mode
from ..core.errors import ImagicError, ImagicWarning
from ..core.tensors import safetensors_pieces
from .adapter import Adapter
from .atomic import AtomicWriter
from .comfyui import TABLE, Encode, comfyui_files
from .contents import canvas_size, embedding_tensors, read_embeddings
from .kohya import component, kohya, metadata, version
from .readers import check_layers, notes
from .record import CARD, EMBEDDINGS, RECORD
from .subject import a1111_word, subject_page, word_use
from .writing import check_outputs, hidden_folder, pieces, writable

Format = Literal["comfyui", "kohya", "diffusers"]
Files = Mapping[str, Iterable[bytes | memoryview]]
_DENOISERS: dict[str, str] = {"sd3": "SD3Transformer2DModel", "flux2-klein": "Flux2Transformer2DModel"}
_KOHYA_USE = "Copy `{name}.safetensors` to the LoRA folder of ComfyUI or A1111 and use it at strength 1."
_COMFYUI_USE = "Copy `{name}.safetensors` to the LoRA folder of ComfyUI and use it at strength 1. A1111 does not read it."
_DIFFUSERS_USE: dict[Mode, str] = {
    "lora": "Load them with `pipe.load_lora_weights` on this folder.",
    "full": "Load them with `{denoiser}.from_pretrained` on the folder `{component}`.",
    "embedding": "There are none. The edit uses the denoiser of the base, unchanged.",
}
_WITH_WEIGHTS = (
    "The weights are one half of the edit. The embeddings in `{embeddings}` are the other half.",
    "Eta 0 reproduces the photo. Eta 1 is the target prompt itself: a program that\n"
    "accepts no embeddings can use the target prompt as its prompt.",
)
_WITHOUT_WEIGHTS = (
    "The embeddings in `{embeddings}` are the whole edit.",
    "Eta 0 comes nearest to the photo. Eta 1 is the target prompt itself.",
)
_MIXED_EMBEDDINGS = """In place of a prompt, the denoiser gets

    eta * target + (1 - eta) * optimised

computed for `tokens` and, if present, for `pooled`."""
_MIXED_VECTORS = """The `vectors` are what a text encoder looks up for the tokens of a prompt, before its first layer. In place of those
of the target prompt, each text encoder gets

    optimised.vectors + share * (target.vectors - optimised.vectors)

where share is eta for the tokens of the words, {padding:g} * eta for the padding, and anything for the start and the end token, which are
equal. `imagic-lora edit` does this by itself; a program that takes embeddings alone can use `optimised.tokens`, which is eta 0."""
_PAGE = """# {name}, an edit of one photo

Made by imagic-lora (Imagic, arXiv 2210.09276) for this target prompt:

    {prompt}

with this base:

    {base}

## The weights

{use}

## The embeddings

{role} The file holds these tensors:

{tensors}

`target` is the embedding of the target prompt, `optimised` the embedding of the photo, and `null` the embedding of the empty prompt.
{mixing} {ends} The default eta of this edit is {eta:g}.

In diffusers, pass the {mixed} as `prompt_embeds` and `null` as `negative_prompt_embeds`. SDXL and Stable Diffusion 3 also
need `pooled` as `pooled_prompt_embeds`, and SDXL the six numbers of `time_ids` as `original_size`, `crops_coords_top_left` and
`target_size`.

The images were sampled at {width} x {height} pixels in {steps} steps at guidance scale {guidance:g}, starting from {start}.
"""


def export(
    adapter: Adapter,
    layout: Format,
    folder: Path,
    overwrite: bool = False,
    encode: Encode | None = None,
    etas: Sequence[float] = TABLE,
) -> list[Path]:
    """Writes an adapter's weights, its embeddings and a page that explains their use. No file gets its final name before all are written.

    Adapters of other methods than imagic have no embeddings to export. A new word is written as A1111 reads it for ``kohya``.

    Warns with what the programs leave out or do in another way.

    Args:
        adapter: the adapter to export.
        layout: ``comfyui`` writes a folder ``NAME`` to merge into ComfyUI's: LoRA, embeddings, nodes and workflows. ``kohya`` writes
            ``NAME.safetensors``, ``NAME.embeddings.safetensors`` and ``NAME.md``. ``diffusers`` writes a folder ``NAME``.
        folder: the folder to write to; created if it does not exist.
        overwrite: whether existing files of the same names are replaced.
        encode, etas: for ``comfyui``, as :func:`~imagic_lora.adapters.comfyui.comfyui_files` takes them.

    Returns:
        The paths of the files: those of the weights, if there are any, then the embeddings and the page.

    Raises:
        ImagicError: an adapter without LoRA layers is exported in kohya's format, which has nothing else, or one with a layer that no
            reader of it knows; ComfyUI cannot make the edit (:func:`~imagic_lora.adapters.comfyui.comfyui_files`); a file exists already
            or cannot be written; the adapter is invalid.
    """
    if layout == "comfyui":
        files = comfyui_files(adapter, encode, etas)
    else:
        files = {"kohya": _for_kohya, "diffusers": _for_diffusers}[layout](adapter)
    folder = folder if layout == "kohya" else folder / adapter.name
    paths = [folder / name for name in files]
    check_outputs(folder, files)
    if (folder / RECORD).exists():
        raise ImagicError(f"{folder} is a stored adapter", "another folder for the exported files", "choose another --out")
    if (taken := [path for path in paths if path.exists()]) and not overwrite:
        raise ImagicError(f"{taken[0]} exists", "a new file", "choose another --out, or use --overwrite")
    with writable(folder), hidden_folder(folder, ".export-") as hidden:
        writer = AtomicWriter(hidden)
        for k, content in enumerate(files.values()):
            writer.write(str(k), content)
        for k, path in enumerate(paths):  # after all writes, so that an error leaves existing files unchanged
            path.parent.mkdir(parents=True, exist_ok=True)
            (writer.folder / str(k)).replace(path)
    return paths


def _for_kohya(adapter: Adapter) -> Files:
    name, mode = adapter.name, adapter.record.config.tune.mode
    if adapter.record.config.method == "textual-inversion":
        page = subject_page(adapter, word_use(adapter, a1111=True))
        return {f"{name}.safetensors": safetensors_pieces(a1111_word(adapter)), f"{name}.md": [page]}
    if mode != "lora":
        holds = "full weights" if mode == "full" else "no weights (mode embedding)"
        other = f"convert it with: imagic-lora compress {name} --rank 16" if mode == "full" else "fit it with --mode lora"
        got = f"adapter {name} holds {holds}, and the kohya format stores LoRA layers only"
        raise ImagicError(got, "a LoRA adapter", f"{other}; or use --format diffusers")
    tensors, embeddings = kohya(adapter), f"{name}.embeddings.safetensors"
    layers = {key.partition(".")[0] for key in tensors}
    check_layers(layers)
    use = [
        (_KOHYA_USE if component(adapter) == "unet" else _COMFYUI_USE).format(name=name),
        *notes(layers, adapter.record.prompt, version(adapter) != "v1"),
    ]
    for note in use[1:]:
        warnings.warn(note, ImagicWarning, stacklevel=3)
    weights = {f"{name}.safetensors": safetensors_pieces(tensors, metadata(adapter))}
    if adapter.record.config.method != "imagic":
        return weights | {f"{name}.md": [subject_page(adapter, "\n\n".join(use))]}
    return weights | {
        embeddings: _embeddings(adapter),
        f"{name}.md": [_page(adapter, "\n\n".join(use), embeddings)],
    }


def _for_diffusers(adapter: Adapter) -> Files:
    denoiser = _DENOISERS.get(version(adapter), "UNet2DConditionModel")
    use = _DIFFUSERS_USE[adapter.record.config.tune.mode].format(denoiser=denoiser, component=component(adapter))
    weights = {file: pieces(adapter.listed(file)) for file in adapter.record.weight_files}
    if adapter.record.config.method != "imagic":
        use = word_use(adapter, a1111=False) if adapter.record.config.method == "textual-inversion" else use
        return weights | {CARD: [subject_page(adapter, use)]}
    page = _page(adapter, use, EMBEDDINGS)
    return weights | {EMBEDDINGS: _embeddings(adapter), CARD: [page]}


def _embeddings(adapter: Adapter) -> Iterable[bytes | memoryview]:
    """The file of the embeddings, with the optimised one in full: other programs know no difference."""
    if adapter.record.config.embed.stores_difference:
        return safetensors_pieces(embedding_tensors(read_embeddings(adapter)))
    return pieces(adapter.listed(EMBEDDINGS))


def _page(adapter: Adapter, use: str, embeddings: str) -> bytes:
    """Returns the page that explains the files. User text is placed in indented code blocks, where Markdown has no effect."""
    record = adapter.record
    role, ends = _WITH_WEIGHTS if record.parts else _WITHOUT_WEIGHTS
    shapes = {
        f"{name}.{tensor_name}": list(value.shape)
        for name, conditioning in read_embeddings(adapter).items()
        for tensor_name, value in conditioning.tensors().items()
    }
    vectors, (width, height) = record.config.embed.space == "input", canvas_size(adapter)
    text = _PAGE.format(
        name=adapter.name,
        prompt=json.dumps(record.prompt),
        base=json.dumps(record.base.name),
        use=use,
        role=role.format(embeddings=embeddings),
        ends=ends,
        tensors="\n".join(f"- `{name}` {shape}" for name, shape in sorted(shapes.items())),
        mixing=_MIXED_VECTORS.format(padding=record.config.edit.padding_eta) if vectors else _MIXED_EMBEDDINGS,
        mixed="encoded vectors" if vectors else "interpolated `tokens`",
        eta=record.eta,
        height=height,
        width=width,
        steps=record.config.edit.steps,
        guidance=record.config.edit.guidance_scale,
        start=record.config.edit.start,
    )
    return text.encode()
