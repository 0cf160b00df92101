"""The commands that make something else of a stored adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..console import err, plain, print_json, progress
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, Whole, suggested_etas
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
    """Make a small LoRA adapter of a full one: the nearest to it at a rank, and how far that is.

    Works on the CPU, minutes for a base of the size of Stable Diffusion.

    Parameters
    ----------
    adapter
        An adapter of mode full, see: imagic-lora list
    rank
        Of the LoRA matrices, on every linear and convolutional layer.
    name
        Name of the new adapter; ADAPTER-rRANK where not given.
    base
        Load the base from here instead of where the adapter says; it must be the same weights.
    overwrite
        Replace an adapter of the same name.
    """
    from ...adapters.compress import check_compression
    from ...adapters.compress import compress as compressed
    from ...adapters.store import Store
    from ...bases.loading.progress import hide_progress_bars
    from ...bases.loading.registry import load_base
    from ...core.config import MemoryConfig
    from ...core.runtime import resolve_runtime

    hide_progress_bars()
    adapters = Store(store)
    full = adapters.read(adapter)
    named = name or f"{full.name}-r{rank}"
    check_compression(full, rank)
    adapters.check_free(named, overwrite)
    source = (base, None) if base else (full.record.base.name, full.record.base.revision)
    runtime = resolve_runtime(MemoryConfig(device="cpu", dtype="fp32", idle="release"))
    opened = load_base(source[0], runtime, source[1])
    made = compressed(full, opened, rank, adapters, named, overwrite, lambda names: progress(names, len(names), "tensors"))
    assert made.record.compressed is not None
    lost = made.record.compressed.error
    if as_json:
        print_json({"name": made.name, "folder": str(made.folder), "bytes": made.size, "error": lost, **summary(made)})
        return
    sizes = f"{made.size / 1e6:.2f} MB of {full.size / 1e6:.2f}"
    told = f"lost: {lost:.1%} of the norm of what was changed, of which pictures show little (docs/adapters.md)."
    err.print(f"[green]Stored[/] {plain(made.folder)} ({sizes}); {told}", highlight=False)
    if made.size > full.size:
        err.print("[yellow]Warning:[/] it is larger than the full adapter; choose a lower --rank")
    err.print(f"  imagic-lora edit {made.name} --eta {suggested_etas(made.record.config.eta)}", highlight=False)


def export(
    name: str,
    *,
    kind: Annotated[Literal["kohya", "diffusers"], Parameter(name="--format")],
    out: Path = Path("outputs/export"),
    store: StoreDir = DEFAULT_STORE,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for other programs, with its embeddings and a page on how to use them.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    kind
        kohya is one file that ComfyUI and A1111 read (mode lora), diffusers a folder that diffusers reads (either mode).
    out
        Folder to write into.
    overwrite
        Replace files of the same names.
    """
    from ...adapters.export import export as exported
    from ...adapters.store import Store

    files = exported(Store(store).read(name), kind, out, overwrite)
    if as_json:
        print_json({"name": name, "format": kind, "files": [str(file) for file in files]})
        return
    for file in files:
        err.print(f"[green]Wrote[/] {plain(file)}", highlight=False)
