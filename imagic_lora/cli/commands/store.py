"""The commands on the store: ``list``, ``show``, ``verify``, ``rename`` and ``rm``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ...core.errors import ImagicError
from ..console import err, out, plain, print_columns, print_json
from ..options import DEFAULT_STORE, Flag, Json, StoreDir

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...adapters.record import Record, StageRecord


def list_adapters(*, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the stored adapters and the unfinished fits."""
    from ...adapters.store import Store

    folder = Store(store)
    adapters: list[Adapter] = []
    skipped: dict[str, str] = {}
    for name in folder.names():
        try:
            adapters.append(folder.read(name, verify=False))
        except ImagicError as error:
            skipped[name] = error.got
            err.print(f"[yellow]Skipped:[/] {plain(error.got)}", highlight=False)
    unfinished = folder.unfinished()
    if as_json:
        rows = [{"name": adapter.name, "bytes": adapter.size, **summary(adapter)} for adapter in adapters]
        print_json({"adapters": rows, "unfinished": unfinished, "skipped": skipped})
        return
    for name in unfinished:
        err.print(f"[yellow]Unfinished:[/] {plain(name)}; repeat its fit command with --resume to continue", highlight=False)
    if not adapters and not skipped:
        err.print(f"No adapters in {plain(store)} yet. Create one: imagic-lora fit PHOTO PROMPT")
    if not adapters:
        return
    columns = [("NAME", "BASE", "MODE", "MB", "CREATED", "PROMPT")]
    for adapter in adapters:
        record, size = adapter.record, f"{adapter.size / 1e6:.2f}"
        columns.append((adapter.name, record.base.name, _kind(record), size, record.created[:10], record.prompt))
    print_columns(columns)


def _kind(record: Record) -> str:
    """The mode of an adapter, and its method if that is not Imagic."""
    names: dict[str, str] = {"imagic": record.config.tune.mode, "dreambooth": f"dreambooth-{record.config.tune.mode}"}
    return names.get(record.config.method, record.config.method)


def show(name: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Show the record of an adapter: prompt, base, settings, losses, time, memory.

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    """
    from ...adapters.store import Store

    adapter = Store(store).read(name, verify=False)
    record = adapter.record
    if as_json:
        print_json({"folder": str(adapter.folder), "bytes": adapter.size, **record.model_dump(mode="json"), "name": adapter.name})
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    facts = {"name": adapter.name, "folder": str(adapter.folder), "MB": f"{adapter.size / 1e6:.2f}", **summary(adapter)}
    facts["stages"] = "; ".join(f"{stage}: {_stage_text(one)}" for stage, one in record.stages.items()) or "not recorded"
    for key, value in facts.items():
        table.add_row(f"[dim]{key}[/]", plain(json.dumps(value) if isinstance(value, dict) else str(value)))
    out.print(table)


def verify(name: str | None = None, *, verbose: Flag = False, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Check that no file of the stored adapters has changed.

    Every byte is compared with the hashes that were stored with the adapter. The exit code is 2 if an adapter has changed.

        imagic-lora verify          # all adapters
        imagic-lora verify rex

    Parameters
    ----------
    name
        Name of the adapter. Default: all adapters.
    verbose
        Print the names of unchanged adapters too.
    """
    from ...adapters.store import Store

    adapters = Store(store)
    stored = adapters.names()
    if name and name not in stored:
        adapters.read(name)  # raises the error for a name that does not exist
    names, changed = [name] if name else stored, dict[str, ImagicError]()
    for checked in names:
        try:
            adapters.read(checked)
        except ImagicError as error:
            changed[checked] = error
            continue
        if verbose:
            err.print(f"[green]Unchanged:[/] {plain(checked)}", highlight=False)
    if names:
        counted = f"{len(names)} adapter{'' if len(names) == 1 else 's'}"
        err.print(f"Verified {counted}: {len(names) - len(changed)} unchanged, {len(changed)} changed", highlight=False)
    for changed_name, error in changed.items():
        err.print(f"[red]Changed:[/] {plain(changed_name)}: {plain(error.got)}", highlight=False)
    if changed:
        got = "; ".join(error.got for error in changed.values())
        raise ImagicError(got, "adapters as they were written", next(iter(changed.values())).remedy)
    if as_json:
        print_json({"unchanged": names})
    elif not names:
        err.print(f"No adapters in {plain(store)}")


def remove(name: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Delete an adapter, and the checkpoints of an unfinished fit of that name.

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    """
    from ...adapters.store import Store

    Store(store).remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        err.print(f"[green]Removed[/] {plain(name)}", highlight=False)


def rename(name: str, new: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Give an adapter another name.

        imagic-lora rename rex rex-jumps

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    new
        The new name. No adapter may have it.
    """
    from ...adapters.store import Store

    adapter = Store(store).rename(name, new)
    if as_json:
        print_json({"renamed": name, "name": adapter.name, "folder": str(adapter.folder)})
    else:
        err.print(f"[green]Renamed[/] {plain(name)} to {plain(adapter.name)}", highlight=False)


def _stage_text(stage: StageRecord) -> str:
    """How a training stage went, in words."""
    early = f" of {stage.asked}" if stage.ended == "early stop" else ""
    why = " (early stop: the relative loss no longer fell)" if stage.ended == "early stop" else ""
    relative = "" if stage.relative_loss is None else f", relative loss {stage.relative_loss:.2f}"
    return f"{stage.done}{early} steps{why}{relative}"


def summary(adapter: Adapter) -> dict[str, Any]:
    """Returns the main facts of an adapter as JSON values, for ``list``, ``show``, ``fit`` and ``compress``."""
    record = adapter.record
    return {
        "prompt": record.prompt,
        "base": record.base.name,
        "mode": record.config.tune.mode,
        **({"method": record.config.method} if record.config.method != "imagic" else {"eta": record.eta}),
        "seed": record.config.seed,
        "photo": f"{record.source.size[0]}x{record.source.size[1]}",
        **({"region": list(record.source.region)} if record.source.region else {}),
        **({"photos": 1 + len(record.source.others)} if record.source.others else {}),
        **({"withheld_photo": {"sha256": record.source.sha256}} if record.source.withheld else {}),
        **({"stored_photo": {"file": record.source.file, "bytes": adapter.photo_size}} if record.source.file else {}),
        "losses": {stage: list(values) for stage, values in record.losses.items()},
        **({"stages": {stage: one.model_dump() for stage, one in record.stages.items()}} if record.stages else {}),
        "seconds": record.seconds,
        "peak_memory": record.peak_memory,
        "created": record.created,
        "files": list(record.files),
        **({"suggested": record.suggested.model_dump()} if record.suggested else {}),
        **({"compressed": record.compressed.model_dump()} if record.compressed else {}),
    }
