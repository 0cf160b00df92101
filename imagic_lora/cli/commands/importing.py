"""The command ``import``."""

from __future__ import annotations

from pathlib import Path

from ..console import err, plain, print_json
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Json, StoreDir, suggested_flags
from .store import summary


def import_adapter(folder: Path, *, name: str | None = None, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """Copy an adapter from another folder into the store.

    Every file is compared with the hash in the record; weights, embeddings and photo are checked. Nothing in the folder is executed.

        imagic-lora import ~/Downloads/rex --name rex

    Parameters
    ----------
    folder
        Folder of the adapter: the one with adapter.json.
    name
        Name in the store. Default: the name of the folder.
    """
    import_libraries()
    from ...adapters.importing import import_adapter as copy_adapter
    from ...adapters.store import Store

    adapter = copy_adapter(folder, Store(store), name)
    if as_json:
        print_json({"name": adapter.name, "folder": str(adapter.folder), "bytes": adapter.size, **summary(adapter)})
        return
    err.print(f"[green]Imported[/] {plain(adapter.folder)} ({adapter.size / 1e6:.2f} MB, base {plain(adapter.record.base.name)})")
    err.print(f"  imagic-lora edit {adapter.name} {suggested_flags(adapter)}", highlight=False)
