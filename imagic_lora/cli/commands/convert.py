"""The commands ``compress`` and ``export``, which convert a stored adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ...core.errors import ImagicError
from ..console import err, plain, print_json, progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, Whole, parse_etas, suggested_flags
from .store import summary


def compress(
    adapter: str,
    /,
    *,
    rank: Whole,
    name: str | None = None,
    base: str | None = None,
    store: StoreDir = DEFAULT_STORE,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Compress a full adapter into a small LoRA adapter.

    The new adapter is the best approximation of the given rank. It runs on the CPU and takes some minutes for Stable Diffusion.

        imagic-lora compress rex --rank 16

    Parameters
    ----------
    adapter
        Name of an adapter of mode full, as imagic-lora list prints it.
    rank
        Rank of the LoRA matrices. Every linear and convolutional layer gets LoRA matrices.
    name
        Name of the new adapter. Default: ADAPTER-rRANK.
    base
        Load the base from this name, folder, file or hub id instead of the one in the adapter. The weights must be the same.
    overwrite
        Replace an existing adapter of the same name.
    """
    import_libraries()
    from ...adapters.compress import check_compression
    from ...adapters.compress import compress as compress_adapter
    from ...adapters.store import Store
    from ...bases.loading.registry import load_base
    from ...core.device_config import MemoryConfig
    from ...core.runtime import resolve_runtime
    from ...sampling.opening import source_of

    adapters = Store(store)
    full = adapters.read(adapter)
    new_name = name or f"{full.name}-r{rank}"
    check_compression(full, rank)
    adapters.check_free(new_name, overwrite)
    source, revision = source_of(full, base)
    loaded = load_base(source, resolve_runtime(MemoryConfig(device="cpu", dtype="fp32", idle="release")), revision)
    small = compress_adapter(full, loaded, rank, adapters, new_name, overwrite, lambda names: progress(names, len(names), "tensors"))
    assert small.record.compressed is not None
    error = small.record.compressed.error
    if as_json:
        print_json({"name": small.name, "folder": str(small.folder), "bytes": small.size, "error": error, **summary(small)})
        return
    sizes = f"{small.size / 1e6:.2f} MB instead of {full.size / 1e6:.2f} MB"
    err.print(f"[green]Stored[/] {plain(small.folder)} ({sizes})", highlight=False)
    err.print(
        f"Relative error of the weight change: {error:.1%}. It has little effect on images (docs/guide/adapters.md).", highlight=False
    )
    if small.size > full.size:
        err.print("[yellow]Warning:[/] the new adapter is larger than the full adapter; choose a lower --rank")
    err.print(f"  imagic-lora edit {small.name} {suggested_flags(small)}", highlight=False)


def export(
    name: str,
    *,
    kind: Annotated[Literal["comfyui", "kohya", "diffusers"], Parameter(name="--format")],
    eta: str | None = None,
    photo: Path | None = None,
    out: Path = Path("outputs/export"),
    store: StoreDir = DEFAULT_STORE,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Export an adapter for other programs, with its embeddings and a page of instructions.

        imagic-lora export rex --format comfyui

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    kind
        comfyui: a folder to merge into ComfyUI's, with LoRA, embeddings, nodes and a workflow that makes the edit, for modes lora and
        embedding; for an adapter of --embed.space input the base is loaded. kohya: one file for ComfyUI and A1111, for adapters of mode
        lora. diffusers: a folder for diffusers, for every mode.
    eta
        Only for comfyui and adapters of --embed.space input: the etas whose conditionings are exported, several (0.5,0.7) or a range with
        its end. The node in ComfyUI has no others. Default: 0:1.5:0.05. The adapter's own eta and those of the strip are always added.
    photo
        The photo's file, for an adapter that was sent without it, where the workflow of ComfyUI starts from the photo.
    out
        Output folder.
    overwrite
        Replace existing files of the same names.
    """
    import_libraries()
    from ...adapters.comfyui import TABLE
    from ...adapters.comfyui_graphs import reads_photo
    from ...adapters.contents import with_photo
    from ...adapters.export import export as export_adapter
    from ...adapters.store import Store
    from ...sampling.opening import encoded

    adapter, etas = Store(store).read(name), TABLE if eta is None else parse_etas(eta)
    if outside := [one for one in etas if not 0 <= one <= 2]:
        raise ImagicError(f"--eta {outside[0]:g}", "0 (the photo) to 1 (the target prompt), at most 2", "change --eta")
    if eta is not None and kind != "comfyui":
        raise ImagicError(f"--eta together with --format {kind}", "--eta with --format comfyui", "leave out --eta")
    if photo is not None and not (kind == "comfyui" and adapter.withheld and reads_photo(adapter.record.config.edit)):
        got = f"--photo {photo} with --format {kind} and adapter {name}, whose export needs no photo from elsewhere"
        raise ImagicError(got, "an adapter without its photo, and a workflow that starts from it", "leave out --photo")
    adapter = with_photo(adapter, photo)
    encodes = kind == "comfyui" and (eta is not None or adapter.record.config.embed.space == "input")
    files = export_adapter(adapter, kind, out, overwrite, partial(encoded, adapter) if encodes else None, etas)
    if as_json:
        print_json({"name": name, "format": kind, "files": [str(file) for file in files]})
        return
    for file in files:
        err.print(f"[green]Wrote[/] {plain(file)}", highlight=False)
