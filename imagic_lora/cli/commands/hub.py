"""The commands ``push`` and ``pull``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..console import err, out, plain, print_json
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, suggested_flags
from .store import summary

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter

_HONEST = (
    "Weights and embeddings were trained on the photo: whoever has them makes an image at eta 0 that is nearly the photo. No inverted "
    "noise is stored, and none is sent."
)


def push(
    name: str,
    repo: str,
    *,
    private: Flag = False,
    with_photo: Flag = False,
    yes: Flag = False,
    overwrite: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Send an adapter to the Hugging Face Hub, with a model card. Without --yes it prints what would be sent, and sends nothing.

    Without --with-photo the files that show the photo stay here: source.png, the photo's file with its EXIF, preview.png, previews.png.
    Edits that start from noise work without them; others need edit --photo FILE. The weights and embeddings are sent in any case: an edit
    at eta 0 is nearly the photo.

        imagic-lora push rex user/rex-jumps
        imagic-lora push rex user/rex-jumps --private --yes
        imagic-lora push rex user/rex-jumps --private --with-photo --yes

    Parameters
    ----------
    name
        Name of the adapter, as imagic-lora list prints it.
    repo
        Repository, as user/repo. It is created if it does not exist.
    private
        Make a new repository private.
    with_photo
        Send the files that show the photo too.
    yes
        Send it.
    overwrite
        Replace an adapter in an existing repository. The history of the repository keeps the former one, with a photo that was sent then.
    """
    import_libraries()
    from ...adapters.hub import check_repo, push_files
    from ...adapters.hub import push as push_adapter
    from ...adapters.store import Store
    from ...adapters.withheld import shows_photo

    adapter = Store(store).read(name)
    check_repo(repo)
    contents = push_files(adapter, with_photo)
    files = {file: len(content) if isinstance(content, bytes) else content.stat().st_size for file, content in contents.items()}
    shows = shows_photo(adapter.record)
    sent = {file: text for file, text in shows.items() if file in files}
    kept = {file: text for file, text in shows.items() if file not in files}
    result = {"repo": repo, "private": private, "files": files, "shows_photo": sent, "withheld": kept}
    _warn_of_base(adapter)
    if not yes:
        if as_json:
            print_json(result | {"sent": False})
            return
        size, kind = f"{sum(files.values()) / 1e6:.2f} MB", "private" if private else "public"
        out.print(f"Would send {size} to a {kind} repository {plain(repo)}:", soft_wrap=True)
        _print_files(files, sent)
        if kept:
            out.print("Not sent, because they show the photo (--with-photo sends them):", soft_wrap=True)
            _print_files({file: (adapter.folder / file).stat().st_size for file in kept}, kept)
        out.print(_HONEST, soft_wrap=True)
        named = f"adapter.json has the prompt, the base {plain(adapter.record.base.name)}, and the SHA-256 of the photo, by which somebody"
        out.print(f"{named} who has the photo recognises it. Nothing was sent; --yes does.", soft_wrap=True)
        return
    pushed = push_adapter(adapter, repo, with_photo, private, overwrite)
    if as_json:
        print_json(result | {"sent": True, "url": pushed.url})
        return
    without = ", without the photo" if kept else ""
    err.print(f"[green]Sent[/] {len(files)} files{without}: {plain(pushed.url)}", highlight=False)
    err.print(f"  imagic-lora pull {plain(repo)}", highlight=False)


def _print_files(sizes: dict[str, int], notes: dict[str, str]) -> None:
    """Prints a row for each file, however long."""
    for file, size in sizes.items():
        out.print(f"  {file:32} {size:>12,}  {notes.get(file, '')}".rstrip(), markup=False, highlight=False, soft_wrap=True)


def _warn_of_base(adapter: Adapter) -> None:
    """Warns of a base that is a path of this machine."""
    from ...adapters.hub_card import only_here

    if only_here(adapter):
        base = plain(adapter.record.base.name)
        message = f"the base {base} is a path of this machine or a name of your own. adapter.json and the card show it; others need"
        err.print(f"[yellow]Warning:[/] {message} the same weights, and edit --base", highlight=False, soft_wrap=True)


def pull(
    repo: str, *, revision: str | None = None, name: str | None = None, store: StoreDir = DEFAULT_STORE, as_json: Json = False
) -> None:
    """Copy an adapter from the Hugging Face Hub into the store, after the checks of import. Nothing of it is executed.

        imagic-lora pull user/rex-jumps --name rex

    Parameters
    ----------
    repo
        Repository, as user/repo.
    revision
        Branch, tag or commit. Default: the main branch.
    name
        Name in the store. Default: the name of the repository.
    """
    import_libraries()
    from ...adapters.hub import pull as pull_adapter
    from ...adapters.store import Store

    adapter = pull_adapter(repo, Store(store), name, revision)
    if as_json:
        print_json({"name": adapter.name, "folder": str(adapter.folder), "bytes": adapter.size, **summary(adapter)})
        return
    err.print(f"[green]Stored[/] {plain(adapter.folder)} ({adapter.size / 1e6:.2f} MB, base {plain(adapter.record.base.name)})")
    if adapter.withheld:
        digest = adapter.record.source.sha256
        note = f"It was sent without its photo, the file with the SHA-256 {digest}: edits that start from noise work without it"
        err.print(f"{note}, others with --photo FILE.", highlight=False, soft_wrap=True)
    err.print(f"  imagic-lora edit {adapter.name} {suggested_flags(adapter)}", highlight=False)
