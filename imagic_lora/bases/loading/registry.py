"""From what a user calls a base to the base itself."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ...core.errors import ImagicError
from ...core.runtime import Runtime
from ..architecture import Architecture
from ..base import Base
from ..families.sd import StableDiffusion
from ..families.sdxl import StableDiffusionXL
from .configs import local_path
from .files import STEMS, Files, Folder, weight_files
from .known import bases_file, named_base, named_bases
from .published import PUBLISHED
from .single import SingleFile
from .tokenizers import TOKENIZER_FILES

_CONFIGS = [  # of a hub id; nothing of it is run, or even read, on the way
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER_FILES),
    *(f"{part}/config.json" for part in STEMS),
]

_ENDS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files; no hub id ends so


def _weights(variant: str) -> list[str]:
    return [f"{part}/{stem}{variant}{shard}.safetensors" for part, stem in STEMS.items() for shard in ("", "-?????-of-?????")]


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """The architecture of any base; of a hub id without published sizes, by fetching its configs.

    Raises:
        ImagicError: as :func:`locate`; a family without support.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    return files_of(name, revision, configs=True).architecture


def files_of(name: str, revision: str | None = None, configs: bool = False) -> Files:
    """The files of any base.

    Args:
        configs: nothing else is fetched.

    Raises:
        ImagicError: as :func:`locate`.
    """
    place = locate(name, revision, configs)
    return (SingleFile if place.is_file() else Folder)(place, named_base(name))


def family_of(architecture: Architecture) -> type[StableDiffusion]:
    """The class of bases that are built so."""
    return StableDiffusionXL if architecture.text_encoder_2 else StableDiffusion


def locate(name: str, revision: str | None = None, configs: bool = False) -> Path:
    """Where a base is: a folder in diffusers' format or a single file; a hub id is downloaded unless it is in the cache already.

    Args:
        configs: without the weights.

    Raises:
        ImagicError: nothing of that name, not such a folder, or it cannot be fetched.
    """
    known = named_base(name)
    source = known.source if known else name
    if place := local_path(source):
        if named := revision or (known.revision if known else None):
            raise ImagicError(f"revision {named} of {place}", "a revision of a hub id", "leave it out")
        if place.is_dir() and (place / "adapter.json").is_file():
            raise ImagicError(f"{place} is an adapter", "the base that it was made on", "to use it: imagic-lora edit")
        if place.is_dir() and not (place / "model_index.json").is_file():
            raise ImagicError(
                f"{place} has no model_index.json", "a folder in diffusers' format", "give the folder that holds unet/, vae/, ..."
            )
        return place
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(_ENDS):
        whose = f", which {bases_file()} gives as base {name}" if known else ""
        raise ImagicError(f"no file or folder {source}{whose}", "a base that is there", "check the path")
    if "/" not in source:
        names = ", ".join(sorted(named_bases()))
        raise ImagicError(
            f"no base called {name!r}", f"one of {names}, a folder, a file, or a hub id like owner/name", "check the spelling"
        )
    return _fetched(source, revision or (known.revision if known else None), configs)


def _fetched(source: str, revision: str | None, configs: bool) -> Path:
    """A hub id, in half precision where it comes in nothing else."""
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_CONFIGS, *([] if configs else _weights(""))]))
        if not configs and not weight_files(folder, "unet"):
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_CONFIGS, *_weights(".fp16")]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImagicError(
            f"base {source} cannot be fetched ({first})", "a hub id with safetensors files, or a network to reach it",
            "check name and network, or download it elsewhere and give its folder with --base",
        ) from error  # fmt: skip
    return folder


def load_base(name: str, runtime: Runtime, revision: str | None = None, master_weights: bool = False) -> Base:
    """Loads a base.

    Args:
        name: a known name, a folder, a single file, or a hub id.
        master_weights: loads the denoiser as what full fine-tuning trains: in fp32, unless the runtime asks for bf16 weights.

    Raises:
        ImagicError: as :func:`locate`; a family without support; files that are not those of such a base. Nothing in them is run.
    """
    files = files_of(name, revision)
    if named_base(name) is None and local_path(name):
        name = str(files.path.resolve())  # so that an adapter finds its base again from any folder
    elif revision is None and (known := named_base(name)):
        revision = known.revision
    return family_of(files.architecture).load(files, name, revision, runtime, master_weights)
