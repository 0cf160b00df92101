"""Loads a base by name, folder, single file or hub id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ...core.errors import ImagicError
from ...core.runtime import Runtime
from ...core.text import check_utf8
from ..architecture import Architecture, KleinArchitecture, SD3Architecture, SD3ClipArchitecture
from ..base import Base
from ..families.common import LatentBase
from ..families.klein import Flux2Klein
from ..families.sd import StableDiffusion
from ..families.sd3 import StableDiffusion3, StableDiffusion3Clip
from ..families.sdxl import StableDiffusionXL
from .configs import with_entry
from .files import STEMS, Files, Folder, weight_files
from .known import bases_file, check_embedded, known_base, local_path, named_bases
from .original.files import SingleFile
from .original.transformers import TransformerFile
from .published import PUBLISHED
from .tokenizers import CHAT_TEMPLATE, TOKENIZER_FILES

_CONFIGS = [  # files to download from a hub repository; downloading neither parses nor executes them
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2", "tokenizer_3") for name in (*TOKENIZER_FILES, CHAT_TEMPLATE)),
    *(f"{part}/config.json" for part in STEMS),
]

_FILE_EXTENSIONS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a name with one of these is a file, not a hub id


def _weight_patterns(variant: str) -> list[str]:
    """Patterns of the weight files to download: whole files and shards of a variant ("" or ".fp16")."""
    return [f"{part}/{stem}{variant}{shard}.safetensors" for part, stem in STEMS.items() for shard in ("", "-?????-of-?????")]


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """The architecture of any base. Only the configs of a hub id are downloaded, and none of a built-in base.

    Args:
        name: a name that ``imagic-lora bases`` lists, a folder, a single file or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ImagicError: as :func:`locate`; the family of the base is not supported.
    """
    known = known_base(name, revision)
    check_embedded(known)
    if known.built_in and local_path(known.source) is None:
        return with_entry(PUBLISHED[known.built_in], known.entry)
    return files_of(name, revision, configs=True).architecture


def files_of(name: str, revision: str | None = None, configs: bool = False) -> Files:
    """The files of any base.

    Args:
        name: name of a base, folder, single file, or hub id.
        revision: branch, tag or commit of a hub id; None for that of the base's entry, otherwise the default branch.
        configs: True to download only the configs of a hub id.

    Raises:
        ImagicError: as :func:`locate`.
    """
    path = locate(name, revision, configs)
    entry = known_base(name, revision).entry
    if not path.is_file():
        return Folder(path, entry)
    return TransformerFile(path, entry) if entry and entry.parts else SingleFile(path, entry)


def family_of(architecture: Architecture) -> type[LatentBase]:
    """The class of the family that an architecture belongs to."""
    if isinstance(architecture, SD3ClipArchitecture):
        return StableDiffusion3Clip
    if isinstance(architecture, SD3Architecture):
        return StableDiffusion3
    if isinstance(architecture, KleinArchitecture):
        return Flux2Klein
    return StableDiffusionXL if "text_encoder_2" in architecture.text_encoders else StableDiffusion


def locate(name: str, revision: str | None = None, configs: bool = False) -> Path:
    """Path of a base: a folder in diffusers' format or a single file. A hub id is downloaded unless it is in the cache.

    Args:
        name, revision, configs: as in :func:`files_of`.

    Raises:
        ImagicError: nothing has this name; the path is no such folder, or is an adapter; a revision is given for a local path; the download
            fails; an embedded base has no weights.
    """
    known = known_base(name, revision)
    check_embedded(known)
    source, entry = known.source, known.entry
    revision = revision or (entry.revision if entry else None)
    if path := local_path(source):
        return _checked_local(path, revision)
    source = source.rstrip("/")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(_FILE_EXTENSIONS):
        origin = f", the source of base {name} in {bases_file()}" if entry else ""
        raise ImagicError(f"no file or folder {source}{origin}", "the path of an existing base", "check the path")
    if "/" not in source:
        names = ", ".join(sorted(named_bases()))
        raise ImagicError(
            f"no base called {name!r}", f"one of {names}, a folder, a file, or a hub id like owner/name", "check the spelling"
        )
    return _downloaded(source, revision, configs)


def _checked_local(path: Path, revision: str | None) -> Path:
    """Returns the path unchanged; raises ImagicError for a revision, an adapter, or a folder without ``model_index.json``."""
    if revision:
        raise ImagicError(f"revision {revision} for the local path {path}", "a revision only for a hub id", "remove the revision")
    if path.is_dir() and (path / "adapter.json").is_file():
        raise ImagicError(f"{path} is an adapter", "the base that the adapter was trained on", "to use the adapter, run imagic-lora edit")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ImagicError(
            f"{path} has no model_index.json", "a folder in diffusers' format", "give the folder that holds vae/, scheduler/, ..."
        )
    return path


def _downloaded(source: str, revision: str | None, configs: bool) -> Path:
    """Folder of a downloaded hub id. The fp16 variant is downloaded only if there are no other weights."""
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_CONFIGS, *([] if configs else _weight_patterns(""))]))
        if not configs and not (weight_files(folder, "unet") or weight_files(folder, "transformer")):
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_CONFIGS, *_weight_patterns(".fp16")]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImagicError(
            f"base {source} cannot be downloaded ({first})", "a reachable hub id with safetensors files",
            "check the name and the network, or download the base on another machine and give its folder with --base",
        ) from error  # fmt: skip
    except RuntimeError as error:  # from pathlib, for a user without a home directory
        got = f"there is no folder to download base {source} to ({error})"
        raise ImagicError(got, "a home directory, or HF_HOME", "set HF_HOME to a folder for downloads") from error
    return folder


def load_base(name: str, runtime: Runtime, revision: str | None = None, master_weights: bool = False) -> Base:
    """Loads a base.

    Args:
        name: name of a base, folder, single file, or hub id.
        runtime: device, precision and memory levers.
        revision: branch, tag or commit of a hub id.
        master_weights: True for full fine-tuning: the denoiser is loaded in fp32, unless the runtime's ``master_weights`` is
            ``bf16-stochastic``.

    Raises:
        ImagicError: as :func:`locate`; the family is not supported; the files are invalid. No code in them is executed.
    """
    files = files_of(name, revision)
    known = known_base(name, revision)
    if local_path(name) and (known.entry is None or name != known.name):
        # an adapter records this name, and must find its base from any working directory; a link is not followed, because the files beside
        # a single file belong to it
        name = str(files.path.absolute())
    else:
        name, revision = known.name, revision or (known.entry.revision if known.entry else None)
    check_utf8(name, "the path of the base")  # an adapter records it
    return family_of(files.architecture).load(files, name, revision, runtime, master_weights)
