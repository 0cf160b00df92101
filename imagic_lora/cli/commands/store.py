"""The commands that only look: at the store, and at the bases that have a name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ...core.errors import ImagicError
from ..console import err, out, plain, print_json
from ..options import DEFAULT_STORE, Json, StoreDir

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter


def list_adapters(*, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """The stored adapters."""
    from ...adapters.store import Store

    found = Store(store)
    adapters: list[Adapter] = []
    for name in found.names():
        try:
            adapters.append(found.read(name, verify=False))
        except ImagicError as error:
            err.print(f"[yellow]Passed over:[/] {plain(error.got)}")
    unfinished = found.unfinished()
    if as_json:
        print_json({"adapters": [{"name": a.name, "bytes": a.size, **summary(a)} for a in adapters], "unfinished": unfinished})
        return
    for name in unfinished:
        err.print(f"[yellow]Unfinished:[/] {plain(name)}; the same fit command with --resume goes on with it", highlight=False)
    if not adapters:
        err.print(f"No adapters in {plain(store)} yet. Make one: imagic-lora fit PHOTO PROMPT")
        return
    table = Table("name", "base", "mode", "prompt", "MB", "made")
    for a in adapters:
        r = a.record
        table.add_row(*map(plain, (a.name, r.base.name, r.config.tune.mode, r.prompt, f"{a.size / 1e6:.2f}", r.created[:10])))
    out.print(table)


def show(name: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """How an adapter was made.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    """
    from ...adapters.store import Store

    adapter = Store(store).read(name, verify=False)
    record = adapter.record
    if as_json:
        print_json({"folder": str(adapter.folder), "bytes": adapter.size, **record.model_dump(mode="json")})
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for key, value in {"name": adapter.name, "folder": str(adapter.folder), "MB": f"{adapter.size / 1e6:.2f}", **summary(adapter)}.items():
        table.add_row(f"[dim]{key}[/]", plain(json.dumps(value) if isinstance(value, dict) else str(value)))
    out.print(table)


def verify(name: str | None = None, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Check every byte of an adapter, or of all of them, against its hashes; exit code 2 if one has changed.

    Parameters
    ----------
    name
        The adapter; all where not given.
    """
    from ...adapters.store import Store

    adapters = Store(store)
    names, wrong = [name] if name else adapters.names(), {}
    for one in names:
        try:
            adapters.read(one)
        except ImagicError as error:
            wrong[one] = error
        else:
            err.print(f"[green]Unchanged:[/] {plain(one)}", highlight=False)
    if wrong:
        got = "; ".join(error.got for error in wrong.values())
        raise ImagicError(got, "adapters as they were written", next(iter(wrong.values())).remedy)
    if as_json:
        print_json({"unchanged": names})
    elif not names:
        err.print(f"No adapters in {plain(store)}")


def remove(name: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Remove an adapter, and what an unfinished fit of that name has saved.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    """
    from ...adapters.store import Store

    Store(store).remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        err.print(f"[green]Removed[/] {plain(name)}", highlight=False)


def summary(adapter: Adapter) -> dict[str, Any]:
    """What people ask of an adapter first."""
    record = adapter.record
    return {
        "prompt": record.prompt,
        "base": record.base.name,
        "mode": record.config.tune.mode,
        "eta": record.config.eta,
        "seed": record.config.seed,
        "photo": f"{record.source.size[0]}x{record.source.size[1]}",
        "losses": {stage: list(ends) for stage, ends in record.losses.items()},
        "seconds": record.seconds,
        "peak_memory": record.peak_memory,
        "created": record.created,
        "files": list(record.files),
        **({"compressed": record.compressed.model_dump()} if record.compressed else {}),
    }
