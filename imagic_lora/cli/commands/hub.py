"""The commands ``push`` and ``pull``."""

from __future__ import annotations

from ..console import err, out, plain, print_json
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, suggested_flags
from .store import summary

_SHOWS = {
    "source.png": "the photo at the size of the fit; every edit needs it",
    "preview.png": "shows the photo and edits of it",
    "previews.png": "shows edits of the photo",
}


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

    An adapter contains its photo, and its weights and embeddings make pictures of it: --with-photo says that you agree to send it.

        imagic-lora push rex user/rex-jumps
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
        Agree that the photo is sent: source.png, the stored file with its EXIF, and previews. --yes needs it.
    yes
        Send it.
    overwrite
        Replace an adapter in an existing repository. The history of the repository keeps the former one.
    """
    import_libraries()
    from ...adapters.hub import check_repo, push_files
    from ...adapters.hub import push as push_adapter
    from ...adapters.store import Store
    from ...core.errors import ImagicError

    adapter = Store(store).read(name)
    check_repo(repo)
    files = {file: len(content) if isinstance(content, bytes) else content.stat().st_size for file, content in push_files(adapter).items()}
    original = {adapter.record.source.file: "the file of the photo, with its EXIF (which can hold the place)"}
    shows = {file: text for file, text in (_SHOWS | original).items() if file in files}
    if yes and not with_photo:
        got = f"--yes without --with-photo: {', '.join(shows)} of adapter {name} show the photo"
        raise ImagicError(got, "your agreement that the photo is sent", "add --with-photo, or keep the adapter to yourself")
    result = {"repo": repo, "private": private, "files": files, "shows_photo": shows}
    if not yes:
        if as_json:
            print_json(result | {"sent": False})
            return
        out.print(f"Would send {sum(files.values()) / 1e6:.2f} MB to {'a private' if private else 'a public'} repository {plain(repo)}:")
        for file, size in files.items():
            out.print(f"  {file:32} {size:>12,}  {shows.get(file, '')}", markup=False, highlight=False)
        out.print("The weights and embeddings show the photo too: an edit at eta 0 is nearly the photo.")
        out.print(
            f"adapter.json names the base {plain(adapter.record.base.name)} and the prompt. Nothing was sent; --with-photo --yes does."
        )
        return
    pushed = push_adapter(adapter, repo, private, overwrite)
    if as_json:
        print_json(result | {"sent": True, "url": pushed.url})
        return
    err.print(f"[green]Sent[/] {len(files)} files: {plain(pushed.url)}", highlight=False)
    err.print(f"  imagic-lora pull {plain(repo)}", highlight=False)


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
    err.print(f"  imagic-lora edit {adapter.name} {suggested_flags(adapter)}", highlight=False)
