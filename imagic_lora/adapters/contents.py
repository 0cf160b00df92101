"""What the files of a stored adapter hold, checked before it is used: embeddings, photo, weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import Mode
from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces
from ..photos.canvas import Canvas, to_pixels
from ..photos.reading import MAX_PIXELS, read_photo
from .adapter import Adapter
from .atomic import AtomicWriter
from .full import full_files, loaded_full
from .lora import LoraLayers, loaded_lora, lora_files, read_lora
from .record import EMBEDDINGS, REMEDY, SOURCE, WeightsRecord


def read_embeddings(adapter: Adapter) -> dict[str, Conditioning]:
    """``target``, ``optimised`` and, where the base has one, ``null``.

    Raises:
        ImagicError: the file holds anything else.
    """
    groups: dict[str, dict] = {}
    for key, value in read(adapter.listed(EMBEDDINGS)).items():
        kind, _, name = key.partition(".")
        groups.setdefault(kind, {})[name] = value.float()
    forms = [{name: value.shape for name, value in named.items()} for named in groups.values()]
    kinds, whole = set(groups), all("tokens" in form and form == forms[0] for form in forms)
    if not whole or not {"target", "optimised"} <= kinds <= {"target", "optimised", "null"}:
        held = ", ".join(sorted(kinds))[:200]
        raise ImagicError(f"{adapter.folder / EMBEDDINGS} holds {held}, or not in equal shapes", "the embeddings of one base", REMEDY)
    return {kind: Conditioning.from_tensors(named) for kind, named in groups.items()}


def read_canvas(adapter: Adapter) -> Canvas:
    """The photo as it was trained on.

    Raises:
        ImagicError: the photo cannot be read, or does not lie where the record says.
    """
    source, image = adapter.record.source, read_photo(adapter.listed(SOURCE)).image
    (left, top, right, bottom), (width, height) = source.box, source.size
    inside = 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
    if not inside or min(source.size) < 1 or width * height > MAX_PIXELS:
        got = f"a photo of {width}x{height} at {source.box} of {image.width}x{image.height} pixels"
        raise ImagicError(got, "a part of the canvas", REMEDY)
    return Canvas(to_pixels(image), source.box, source.size)


def check_base(adapter: Adapter, base: Base, force: bool = False) -> None:
    """Compares records and headers alone, before anything is loaded.

    Args:
        force: accepts another base, as long as all shapes are the same.

    Raises:
        ImagicError: it was made for another base, replaces weights of a quantised one, or has a photo or embeddings of other shapes.
    """
    made_for = adapter.record.base
    shapes = {name: tuple(value.shape) for name, value in read_embeddings(adapter)["target"].tensors().items()}
    same = shapes == base.architecture.conditioning
    if made_for.fingerprint != base.fingerprint and not (force and same):
        remedy = "the weights have changed: fit again" if made_for.name == base.name else f"use --base {made_for.name}"
        raise ImagicError(
            f"adapter {adapter.name} was made for base {made_for.name}, not for {base.name}",
            "the weights it was made on" if same else "the weights it was made on: these have embeddings of other shapes",
            f"{remedy}, or edit with --force" if same else remedy,
        )
    if adapter.record.parts != [weights_record(base, adapter.record.config.tune.mode)]:
        raise ImagicError(f"adapter {adapter.name} lists weights under other names", "those of its mode", REMEDY)
    if base.runtime.memory.quantize != "none" and adapter.record.config.tune.mode == "full":
        raise ImagicError(f"adapter {adapter.name} replaces every weight of a quantised base", "a plain base", "open it anew")
    high, wide = read_canvas(adapter).pixels.shape[2:]
    most, multiple = max(adapter.record.config.resolution or base.resolution, base.size_multiple), base.size_multiple
    if high * wide > most**2 or high % multiple or wide % multiple:
        raise ImagicError(
            f"adapter {adapter.name} has a canvas of {wide}x{high} pixels", f"at most {most} squared, in whole {multiple}", REMEDY
        )
    if not same:
        raise ImagicError(f"adapter {adapter.name} has embeddings of shapes {shapes}", f"{base.architecture.conditioning}", REMEDY)


def read_layers(adapter: Adapter, base: Base, force: bool = False) -> LoraLayers | None:
    """Its LoRA layers, in host memory; None for full weights, which are large and go from the disk into the base.

    Args:
        force: as for :func:`check_base`.

    Raises:
        ImagicError: as :func:`check_base`; layers that do not fit the base, or are not finite.
    """
    check_base(adapter, base, force)
    (part,) = adapter.record.parts
    paths = [adapter.listed(file) for file in part.files]
    return read_lora(base, paths[0]) if part.mode == "lora" else None


def applied(adapter: Adapter, base: Base) -> AbstractContextManager[object]:
    """The base with this adapter's weights; bit-equal to before afterwards.

    Raises:
        ImagicError: as :func:`read_layers`; full weights that do not fit the base, or are not finite.
    """
    layers = read_layers(adapter, base)
    return loaded_full(base, adapter.folder) if layers is None else loaded_lora(base, layers)


def save_embeddings(writer: AtomicWriter, named: Mapping[str, Conditioning]) -> None:
    """Writes conditionings as ``<name>.tokens``, ``<name>.pooled`` and every extra input, fp32."""
    writer.write(
        EMBEDDINGS, safetensors_pieces({f"{kind}.{name}": t.float() for kind, c in named.items() for name, t in c.tensors().items()})
    )


def weights_record(base: Base, mode: Mode) -> WeightsRecord:
    """Where a base's trained weights are stored."""
    return WeightsRecord(component=base.component, mode=mode, files=list((lora_files if mode == "lora" else full_files)(base)))
