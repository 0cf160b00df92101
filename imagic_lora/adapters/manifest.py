"""Manifests: JSON files that hold the hash of every other file of their folder, and a hash of their own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bases.loading.vetting import parsed_json
from ..core.errors import ImagicError, unreadable
from ..core.validation import first_problem

_OWN_HASH = re.compile(rb',\n  "sha256": "[0-9a-f]{64}"\n}\n\Z')
_MAX_MANIFEST = 2**20  # bytes; a larger manifest is not read
_PIECE = 2**20  # bytes that are hashed at once
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The fields of a folder's manifest, except its own hash. ``files`` maps every other file of the folder to its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    files: dict[FileName, Sha256] = {}
    MAX_BYTES: ClassVar[int] = 2**38
    """Size of all files together: a larger folder is rejected before any of it is read."""

    def max_bytes(self, file: str) -> int:
        """Returns the maximum size of a file: a larger one is rejected before it is read."""
        return self.MAX_BYTES


M = TypeVar("M", bound=Manifest)


def manifest_bytes(manifest: Manifest, files: Mapping[str, str]) -> bytes:
    """Returns the content of a manifest, with a hash of its own.

    Args:
        manifest: its ``files`` are replaced.
        files: the hash of every other file of the folder, by its path.
    """
    fields = manifest.model_dump(mode="json") | {"files": dict(sorted(files.items()))}
    return _serialised(fields | {"sha256": hashlib.sha256(_serialised(fields)).hexdigest()})


def read_manifest(folder: Path, name: str, model: type[M]) -> M:
    """Reads a manifest and verifies it against its own hash.

    Args:
        folder: the folder that the manifest describes.
        name: file name of the manifest.
        model: the pydantic model of its fields.

    Raises:
        ImagicError: the file is missing or cannot be read, does not match its hash, holds NaN or infinity, or does not fit the model.
    """
    path = folder / name
    try:
        if not path.is_file() or (size := path.stat().st_size) > _MAX_MANIFEST:
            raise ValueError(f"it is missing or larger than {_MAX_MANIFEST:,} bytes")
        with path.open("rb") as file:
            content = file.read(size)  # not to its end, which a file of the kernel may not have
        fields = parsed_json(content)
        json.dumps(fields, ensure_ascii=False).encode()  # raises UnicodeError for a lone surrogate, which JSON can contain
        if fields.pop("sha256", None) != _hash_without_its_own(content):
            raise ValueError("it does not match its hash")
        return model.model_validate(fields)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            problem = first_problem(error)
            reason = f"{problem.got}, expected {problem.expected}" if problem.place else problem.got
        else:
            reason = str(error).splitlines()[0]
        raise ImagicError(f"{path} is not a valid manifest ({reason})", "an unchanged manifest", "create or copy it again") from error


def changed_file(folder: Path, manifest: Manifest) -> Path | None:
    """Returns the path of the first file that is missing or does not match its hash; None if every file matches.

    Raises:
        ImagicError: a file cannot be read, or is larger than the manifest's schema allows.
    """
    sizes: dict[str, int] = {}
    for name in manifest.files:
        path = folder / name
        try:
            if not path.is_file():
                return path
            sizes[name] = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from error
        if (limit := min(manifest.max_bytes(name), manifest.MAX_BYTES - sum(sizes.values()) + sizes[name])) < sizes[name]:
            raise ImagicError(f"{path} has {sizes[name]:,} bytes", f"at most {limit:,} bytes", "create or copy it again")
    for name, digest in manifest.files.items():
        try:
            if _sha256(folder / name, sizes[name]) != digest:
                return folder / name
        except OSError as error:
            raise unreadable(folder / name, error) from error
    return None


def _sha256(path: Path, size: int) -> str:
    """The hash of the first ``size`` bytes of a file: all of it, unless it is growing or without an end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(size, _PIECE))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def _serialised(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()


def _hash_without_its_own(content: bytes) -> str:
    """The hash of what a manifest was before its own hash was added as the last key; much cheaper than serialising it again."""
    last_key = _OWN_HASH.search(content)
    return hashlib.sha256(content[: last_key.start()] + b"\n}\n").hexdigest() if last_key else ""
