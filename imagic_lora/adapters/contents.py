"""Reads and checks the content of a stored adapter: embeddings, photo and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import VECTORS, Conditioning, changed, difference
from ..core.config import Mode, TunedMode
from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces
from ..photos.canvas import Canvas, middle_square, to_pixels
from ..photos.files.opening import MAX_PIXELS
from ..photos.reading import read_photo
from .adapter import Adapter
from .atomic import AtomicWriter
from .full import FullWeights, loaded_full
from .lora import LORA_FILE, LoraLayers, loaded_lora, read_lora
from .modes import MODES
from .record import EMBEDDINGS, REMEDY, SOURCE, WeightsRecord
from .withheld import made_canvas

StoredWeights = LoraLayers | FullWeights | None
"""The weights of an adapter; None in mode embedding, whose edits use the denoiser of the base."""


def read_embeddings(adapter: Adapter) -> dict[str, Conditioning]:
    """Reads the embeddings of an adapter.

    Returns:
        The fp32 conditionings ``target``, ``optimised`` and, if the base has an unconditional one, ``null``.

    Raises:
        ImagicError: the file holds other embeddings, or embeddings of different or invalid shapes.
    """
    embeddings: dict[str, dict[str, Tensor]] = {}
    for key, value in read(adapter.listed(EMBEDDINGS)).items():
        name, _, tensor_name = key.partition(".")
        embeddings.setdefault(name, {})[tensor_name] = value.float()
    _add_difference(adapter, embeddings)
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in embeddings.values()]
    vectors = {name: value.shape for name, value in embeddings.get("target", {}).items() if name.startswith(VECTORS)}
    compared = [each | vectors if name == "null" else each for name, each in zip(embeddings, shapes, strict=True)]
    names, consistent = set(embeddings), all("tokens" in each and each == compared[0] for each in compared)
    if consistent and bool(vectors) != ((space := adapter.record.config.embed.space) == "input"):
        got = f"{adapter.folder / EMBEDDINGS} holds {'' if vectors else 'no '}vectors of tokens; the record says embed.space {space}"
        raise ImagicError(got, "vectors where embed.space is input, and only there", REMEDY)
    if shapes and consistent and (wrong := [(name, shape) for name, shape in shapes[0].items() if not _is_valid(name, shape)]):
        got = f"{adapter.folder / EMBEDDINGS} holds {wrong[0][0][:80]!r} of the shape {list(wrong[0][1])}"
        raise ImagicError(got, "tokens and vectors [1, T, D], pooled [1, P], mask [1, T], and other inputs [1, ...]", REMEDY)
    if not consistent or not {"target", "optimised"} <= names <= {"target", "optimised", "null"}:
        listed = ", ".join(sorted(names))[:200] or "none"
        raise ImagicError(
            f"{adapter.folder / EMBEDDINGS} holds the embeddings: {listed}; their shapes are {'equal' if consistent else 'not equal'}",
            "target, optimised and optionally null, each with tokens, in equal shapes",
            REMEDY,
        )
    return {name: Conditioning.from_tensors(tensors) for name, tensors in embeddings.items()}


def _add_difference(adapter: Adapter, embeddings: dict[str, dict[str, Tensor]]) -> None:
    """Replaces ``difference`` of the optimised embedding by its tokens: those of the target with what was added.

    Raises:
        ImagicError: its shape does not fit the tokens of the target.
    """
    added = embeddings.get("optimised", {}).pop("difference", None)
    if added is None:
        return
    named = embeddings.get("target", {})
    tokens, mask = named.get("tokens"), named.get("mask")
    if tokens is not None and tokens.ndim >= 3 and (mask is None or mask.shape == tokens.shape[:2]) and len(tokens) == 1:
        count = tokens.shape[1] if mask is None else int((mask != 0).sum())
        if added.shape == (1, count, *tokens.shape[2:]) and "tokens" not in embeddings["optimised"]:
            target = Conditioning(tokens, mask=None if mask is None else mask != 0)
            embeddings["optimised"]["tokens"] = changed(target, {"tokens": added}).tokens
            return
    got = f"{adapter.folder / EMBEDDINGS} holds optimised.difference of the shape {list(added.shape)}"
    raise ImagicError(got, "one row for each token of target.mask, or of target.tokens", REMEDY)


def _is_valid(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of one conditioning can have this shape; :func:`check_base` compares it with that of the base."""
    dimensions = {"tokens": max(3, len(shape)), "pooled": 2, "mask": 2}.get(name, 3 if name.startswith(VECTORS) else len(shape))
    return len(shape) == dimensions and shape[:1] == (1,) and all(shape)


def read_canvas(adapter: Adapter) -> Canvas:
    """Reads the canvas with the photo, or the region of it, that the adapter was trained on.

    For an adapter that withholds its photo it is made anew from the photo's file, :attr:`~imagic_lora.adapters.adapter.Adapter.photo`;
    without one it is unknown: it has a size and no pixels.

    Raises:
        ImagicError: the photo cannot be read or is another one, or its recorded box, size or region is out of range.
    """
    source = adapter.record.source
    if source.withheld is not None:
        _check_box(adapter, source.withheld.canvas)
        if adapter.photo is None:
            return Canvas.unknown(source.withheld.canvas, source.box, source.fitted.size)
        return made_canvas(adapter.name, source, read_original(adapter))
    image = read_photo(adapter.listed(SOURCE)).image
    _check_box(adapter, image.size)
    return Canvas(to_pixels(image), source.box, source.fitted.size)


def _check_box(adapter: Adapter, canvas: tuple[int, int]) -> None:
    """Raises ImagicError if the recorded box, size or region is out of range on a canvas of this width and height."""
    source, (canvas_width, canvas_height) = adapter.record.source, canvas
    (left, top, right, bottom), (width, height), region = source.box, source.size, source.fitted
    inside = 0 <= left < right <= canvas_width and 0 <= top < bottom <= canvas_height and region.inside(source.size)
    if not inside or max(width * height, canvas_width * canvas_height) > MAX_PIXELS:
        part = f"a photo of {width}x{height} pixels" if source.region is None else f"region {region} of a photo of {width}x{height} pixels"
        got = f"{part} in the box {source.box} of a canvas of {canvas_width}x{canvas_height} pixels"
        raise ImagicError(got, f"a box inside the canvas, and a region inside a photo of at most {MAX_PIXELS:,} pixels", REMEDY)


def canvas_size(adapter: Adapter) -> tuple[int, int]:
    """Returns width and height of the canvas of an adapter, in pixels. Raises as :func:`read_canvas`."""
    height, width = read_canvas(adapter).pixels.shape[2:]
    return width, height


def read_original(adapter: Adapter, file: Path | None = None) -> Image.Image:
    """Reads the photo that an adapter was made from, at its full size: upright, RGB in sRGB, as :func:`read_photo` reads every photo.

    Args:
        adapter: the adapter. An adapter without the photo's file is enough where the photo was neither scaled nor cropped for the canvas.
        file: the photo's file, for an adapter that does not hold it.

    Raises:
        ImagicError: the file is not that of the photo; the adapter does not hold it and no file is given.
    """
    source, given = adapter.record.source, file or adapter.photo
    if given is not None or source.file is not None:
        path = given or adapter.listed(str(source.file))
        photo = read_photo(path)
        image = middle_square(photo.image) if source.others else photo.image
        if photo.sha256 != source.sha256 or image.size != source.size:
            got = f"{path} is not the photo that adapter {adapter.name} was made from (its SHA-256 is {photo.sha256})"
            raise ImagicError(got, f"the file with the SHA-256 {source.sha256}", "use the original file, not a copy that was saved again")
        return image
    canvas = read_canvas(adapter)
    left, top, right, bottom = canvas.box
    if not canvas.known or source.region or (right - left, bottom - top) != source.size:
        lacks = "its photo" if not canvas.known else "the photo at its full size"
        got = f"adapter {adapter.name} does not hold {lacks}"
        raise ImagicError(got, "the photo", "add --photo FILE with the photo that it was fitted with")
    return canvas.photo()


def with_photo(adapter: Adapter, photo: Path | None) -> Adapter:
    """Returns an adapter that withholds its photo, with the photo. Every other adapter is returned as it is.

    Args:
        adapter: a stored adapter.
        photo: the photo's file, or None.

    Raises:
        ImagicError: as :func:`read_original`.
    """
    if photo is None or not adapter.withheld:
        return adapter
    given = Adapter(adapter.folder, adapter.record, photo)
    read_original(given)
    return given


def check_base(adapter: Adapter, base: Base, force: bool = False) -> None:
    """Checks that an adapter fits a base. Reads the record, the embeddings and the photo, but no weights.

    Args:
        force: whether a base with another fingerprint is accepted, provided that it uses embeddings of the same shapes.

    Raises:
        ImagicError: the adapter was made for another base, replaces the weights of a quantised base, or has a photo or embeddings of
            unexpected shapes.
    """
    made_for, mode = adapter.record.base, adapter.record.config.tune.mode
    target = read_embeddings(adapter)["target"]
    shapes = {name: tuple(value.shape) for name, value in target.tensors().items()}
    expected = base.architecture.conditioning
    if target.vectors:
        expected |= {f"{VECTORS}{name}": shape for name, shape in base.architecture.vectors.items()}
    same = shapes.pop("mask", shapes["tokens"][:2]) == shapes["tokens"][:2] and shapes == expected
    if made_for.fingerprint != base.fingerprint and not (force and same):
        remedy = "the weights have changed: fit again" if made_for.name == base.name else f"use --base {made_for.name}"
        raise ImagicError(
            f"adapter {adapter.name} was made for base {made_for.name}, not for {base.name}",
            "the base that it was made for" if same else "the base that it was made for; this one has embeddings of other shapes",
            f"{remedy}, or edit with --force" if same else remedy,
        )
    if adapter.record.parts != record_parts(base, mode):
        raise ImagicError(f"adapter {adapter.name} lists unexpected weight files", "the files of its mode and base", REMEDY)
    if base.runtime.memory.quantize != "none" and MODES[mode].in_base:
        raise ImagicError(
            f"adapter {adapter.name} replaces every weight of a quantised base", "a base without quantization", "use --quantize none"
        )
    width, height = canvas_size(adapter)
    side, multiple = max(adapter.record.config.resolution or base.resolution, base.size_multiple), base.size_multiple
    if height * width > side**2 or height % multiple or width % multiple:
        raise ImagicError(
            f"adapter {adapter.name} has a canvas of {width}x{height} pixels",
            f"at most as many pixels as {side}x{side}, and sides that are multiples of {multiple}",
            REMEDY,
        )
    if not same:
        raise ImagicError(f"adapter {adapter.name} has embeddings of shapes {shapes}", f"{expected}", REMEDY)


def read_weights(adapter: Adapter, base: Base, force: bool = False) -> StoredWeights:
    """Checks an adapter and reads its LoRA layers into host memory. Full weights stay on disk.

    Args:
        force: as for :func:`check_base`.

    Raises:
        ImagicError: as :func:`check_base`; a file of the weights is not listed; the layers do not fit the base or are not finite.
    """
    check_base(adapter, base, force)
    for file in adapter.record.weight_files:
        adapter.listed(file)
    match adapter.record.config.tune.mode:
        case "lora":
            return read_lora(base, adapter.listed(LORA_FILE))
        case "full":
            return FullWeights(adapter.folder)
        case "embedding":
            return None


def applied(adapter: Adapter, base: Base) -> AbstractContextManager[object]:
    """Applies an adapter's weights to the base while the context is open. Afterwards the base is bit-equal to before.

    Raises:
        ImagicError: as :func:`read_weights`; full weights do not fit the base or are not finite.
    """
    match read_weights(adapter, base):
        case LoraLayers() as layers:
            return loaded_lora(base, layers)
        case FullWeights(folder):
            return loaded_full(base, folder)
        case None:
            return nullcontext()


def save_embeddings(writer: AtomicWriter, named: Mapping[str, Conditioning], differs: bool = False) -> None:
    """Writes conditionings: :func:`embedding_tensors`.

    Args:
        writer: of the adapter's folder.
        named: conditionings by name: ``target``, ``optimised``, ``null``.
        differs: as there.
    """
    writer.write(EMBEDDINGS, safetensors_pieces(embedding_tensors(named, differs)))


def embedding_tensors(named: Mapping[str, Conditioning], differs: bool = False) -> dict[str, Tensor]:
    """The tensors of conditionings by name: ``<name>.tokens``, ``<name>.pooled``, ``<name>.mask`` and one for each extra input, in fp32.

    Args:
        named: conditionings by name: ``target``, ``optimised``, ``null``.
        differs: whether ``optimised.difference``, in bf16, replaces ``optimised.tokens``: what was added to ``target.tokens``, at the
            tokens of ``target.mask`` or at all. The tokens of the others are in bf16 too where that loses nothing.
    """
    tensors = {
        f"{name}.{tensor_name}": value.float()
        for name, conditioning in named.items()
        for tensor_name, value in conditioning.tensors().items()
    }
    if differs:
        del tensors["optimised.tokens"]
        for name in ("target.tokens", "null.tokens"):
            if name in tensors and torch.equal(tensors[name].bfloat16().float(), tensors[name]):
                tensors[name] = tensors[name].bfloat16()
        tensors["optimised.difference"] = difference(named["optimised"], named["target"])["tokens"].bfloat16()
    return tensors


def weights_record(base: Base, mode: TunedMode) -> WeightsRecord:
    """Returns the component, the mode and the files of a base's trained weights."""
    return WeightsRecord(component=base.component, mode=mode, files=list(MODES[mode].files(base)))


def record_parts(base: Base, mode: Mode) -> list[WeightsRecord]:
    """Returns the ``parts`` of the record of an adapter; none in mode embedding."""
    return [] if mode == "embedding" else [weights_record(base, mode)]
