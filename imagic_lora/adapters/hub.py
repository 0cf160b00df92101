"""Sends an adapter to the Hugging Face Hub, and brings one from there into a store, after every check of an import."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id  # httpx or httpx2: the one that the client uses

from ..core.errors import ImagicError
from .adapter import Adapter
from .hub_card import hub_card, without_front
from .importing import import_adapter
from .manifest import manifest_bytes, read_manifest
from .record import CARD, RECORD, REMEDY, Record
from .store import Store, check_name
from .withheld import without_photo
from .writing import hidden_folder, writable

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_MAX_RECORD = 2**20  # bytes of adapter.json and of the card
_OFFLINE = "run it with a connection to the Hub, and without HF_HUB_OFFLINE"


@dataclass(frozen=True)
class Pushed:
    """What a push sent: the address of the commit, and the paths in the repository."""

    url: str
    files: list[str]


def push_files(adapter: Adapter, photo: bool) -> dict[str, Path | bytes]:
    """The files of a push by their path in the repository: those of the adapter, its record, and the model card as ``README.md``.

    The card ends with the adapter's own ``README.md``: all other files, and that part, are byte for byte those of the store, except the
    record of an adapter whose photo is withheld.

    Args:
        adapter: a verified adapter.
        photo: False withholds the files that show the photo (:func:`~imagic_lora.adapters.withheld.shows_photo`); the record says so.

    Raises:
        ImagicError: the photo is to be sent, and the adapter does not hold it.
    """
    if photo and adapter.withheld:
        got = f"--with-photo with adapter {adapter.name}, which was sent without its photo"
        raise ImagicError(got, "an adapter that holds its photo", "leave out --with-photo")
    record = adapter.record if photo else without_photo(adapter)
    own = adapter.folder / RECORD if record is adapter.record else manifest_bytes(record, record.files)
    files: dict[str, Path | bytes] = {RECORD: own} | {file: adapter.listed(file) for file in sorted(record.files)}
    return files | {CARD: hub_card(adapter, record)}


def check_repo(repo: str) -> str:
    """Returns a repository id of the form ``user/repo``.

    Raises:
        ImagicError: it has another form.
    """
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        got = f"{repo!r} is not the name of a repository of the Hub"
        raise ImagicError(got, "user/repo, of letters, digits, '-', '_' and '.'", "correct the name") from error
    return repo


def push(adapter: Adapter, repo: str, photo: bool, private: bool = False, overwrite: bool = False, api: HfApi | None = None) -> Pushed:
    """Sends an adapter in one commit: a reader sees all of it or nothing. A repository that this call created is deleted if that fails.

    Args:
        adapter: a verified adapter.
        repo: ``user/repo``; created if it does not exist.
        photo: as for :func:`push_files`.
        private: whether a new repository is private.
        overwrite: whether an adapter in an existing repository is replaced. Its history keeps the former one.
        api: the client.

    Raises:
        ImagicError: there is no token, or it may not write; no network; the repository holds something else, or an adapter already.
    """
    api, files = api or HfApi(library_name="imagic-lora"), push_files(adapter, photo)
    if not (api.token or get_token()):
        raise ImagicError("no token of the Hub is stored", "a token that may write", "run hf auth login, or set HF_TOKEN")
    with _explained(check_repo(repo)):
        try:
            info = api.model_info(repo)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            info = None
        there = {sibling.rfilename for sibling in (info.siblings or [])} - {".gitattributes"} if info else set()
        _check_target(repo, there, overwrite)
        if info and private and not info.private:
            raise ImagicError(f"{repo} exists and is public", "a private repository", "make it private on the Hub, or choose another name")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        stale = [CommitOperationDelete(path) for path in sorted(there - files.keys())]
        if info is None:
            api.create_repo(repo, private=private)
        try:
            message = f"Adapter {adapter.name} by imagic-lora"
            commit = api.create_commit(repo, [*operations, *stale], commit_message=message, parent_commit=info.sha if info else None)
        except BaseException:  # Ctrl-C too: an empty repository is half a push
            if info is None:
                api.delete_repo(repo, missing_ok=True)
            raise
    return Pushed(str(commit.commit_url), sorted(files))


def _check_target(repo: str, there: set[str], overwrite: bool) -> None:
    """Raises ImagicError for a repository that holds something else than an adapter, or an adapter that is not to be replaced."""
    if there and RECORD not in there:
        got = f"{repo} exists and is not an adapter of imagic-lora (it has {sorted(there)[0][:80]} and no {RECORD})"
        raise ImagicError(got, "an unused name, or a repository with an adapter", "choose another name")
    if there and not overwrite:
        raise ImagicError(
            f"{repo} holds an adapter", "an unused name", "choose another name, or use --overwrite: its history keeps that one"
        )


def pull(repo: str, store: Store, name: str | None = None, revision: str | None = None, api: HfApi | None = None) -> Adapter:
    """Copies an adapter from the Hub into a store, atomically, after the checks of :func:`import_adapter`. Nothing of it is executed.

    Only files that the record lists are downloaded, all from one commit, into a hidden folder of the store that is deleted at the end.

    Args:
        repo: ``user/repo``.
        store: the store.
        name: name in the store; None for that of the repository.
        revision: branch, tag or commit; None for the main branch.
        api: the client.

    Raises:
        ImagicError: no such repository or revision, or no access; no network; the repository is no adapter, or has a pickle; a file is
            missing, has changed or is too large; the name is taken; as for an import.
    """
    api, new = api or HfApi(library_name="imagic-lora"), check_name(name or check_repo(repo).split("/")[1])
    store.check_free(new, overwrite=False)
    with writable(store.root), hidden_folder(store.root, ".pull-") as hidden, _explained(check_repo(repo), revision):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        _check_kind(repo, sizes)
        folder = hidden / new

        def fetch(file: str, limit: int) -> None:
            if file not in sizes or sizes[file] > limit:
                got = f"{repo} has no {file}" if file not in sizes else f"{file} of {repo} has {sizes[file]:,} bytes"
                raise ImagicError(
                    got, f"every file of the adapter, this one with at most {limit:,} bytes", "ask its owner to push it again"
                )
            downloaded = api.hf_hub_download(repo, file, revision=info.sha, local_dir=hidden / "download")
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(downloaded, folder / file)

        try:
            fetch(RECORD, _MAX_RECORD)
            record = read_manifest(folder, RECORD, Record)
            for file in record.files:
                fetch(file, _MAX_RECORD if file == CARD else record.max_bytes(file))
            if CARD in record.files:
                (folder / CARD).write_bytes(without_front((folder / CARD).read_bytes()))
            return import_adapter(folder, store, new)
        except ImagicError as error:  # its paths are those of the hidden folder, which is gone when somebody reads the message
            remedy = "ask its owner to push it again" if error.remedy == REMEDY else error.remedy
            raise ImagicError(error.got.replace(f"{folder}", repo), error.expected, remedy) from error


def _check_kind(repo: str, files: dict[str, int]) -> None:
    """Raises ImagicError for a repository that has a pickle, or is no adapter."""
    if pickles := sorted(file for file in files if PurePosixPath(file).suffix.lower() in _PICKLES):
        got = f"{repo} has {pickles[0][:80]}, which can be a pickle: a program"
        raise ImagicError(got, "safetensors, JSON, text and pictures only", "do not use it, or ask its owner to remove that file")
    if RECORD not in files:
        got = f"{repo} is not an adapter of imagic-lora (it has no {RECORD})"
        raise ImagicError(got, "a repository that imagic-lora push made", "check the name; a base is used with --base")


@contextmanager
def _explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of the client into errors that a user can correct. The special ones are kinds of the general ones."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ImagicError(f"the Hub is switched off by HF_HUB_OFFLINE, and {repo} is there", "a connection", _OFFLINE) from error
    except GatedRepoError as error:
        raise ImagicError(
            f"{repo} is gated", "a repository that you may read", "accept its terms on the Hub, then hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        got = f"the Hub shows no repository {repo}"
        raise ImagicError(got, "one that exists and that you may read", "check the name; for a private one run hf auth login") from error
    except RevisionNotFoundError as error:
        raise ImagicError(f"{repo} has no revision {revision}", "a branch, tag or commit", "check --revision") from error
    except LocalEntryNotFoundError as error:
        raise ImagicError(f"a file of {repo} cannot be downloaded", "a connection to the Hub", _OFFLINE) from error
    except EntryNotFoundError as error:
        raise ImagicError(f"a file of {repo} is gone", "every file of the adapter", "try again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        reason = f"the Hub refused the request for {repo} (status {status}: {(error.server_message or 'no reason')[:200]})"
        remedy = "check the token: hf auth whoami" if status in (401, 403) else "try again later"
        raise ImagicError(reason, "an accepted request", remedy) from error
    except httpx.HTTPError as error:
        raise ImagicError(f"the Hub cannot be reached ({type(error).__name__})", "a connection", _OFFLINE) from error
