"""Checks JSON files and safetensors headers of untrusted bases before any library reads them. No torch or diffusers import."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from .flow_keys import KLEIN_KEYS, SD3_KEYS
from .keys import KEYS, Keys, check_keys

_COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
_SECOND_TEXT_ENCODER: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": _COMPONENTS["tokenizer"],
}
_JOINT_COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer": ("diffusers", ("SD3Transformer2DModel",)),
    "vae": _COMPONENTS["vae"],
    "text_encoder": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": _COMPONENTS["tokenizer"],
    **_SECOND_TEXT_ENCODER,
    "text_encoder_3": ("transformers", ("T5EncoderModel",)),
    "tokenizer_3": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
}
_KLEIN_COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer": ("diffusers", ("Flux2Transformer2DModel",)),
    "vae": ("diffusers", ("AutoencoderKLFlux2",)),
    "text_encoder": ("transformers", ("Qwen3ForCausalLM",)),
    "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
}
FAMILIES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # library and classes of each component, by pipeline class
    **dict.fromkeys(
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"),
        _COMPONENTS,
    ),
    **dict.fromkeys(
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        _COMPONENTS | _SECOND_TEXT_ENCODER,
    ),
}
FLOW_FAMILIES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # as FAMILIES
    **dict.fromkeys(("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"), _JOINT_COMPONENTS),
    "Flux2KleinPipeline": _KLEIN_COMPONENTS,
}
_CLIP_COMPONENTS = {part: _COMPONENTS[part] for part in ("text_encoder", "tokenizer")}  # of a base with this text encoder alone
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # components that a base may lack: [null, null] in its index
MAX_HEADER = 2**22  # bytes of a safetensors header; that of a Stable Diffusion XL single file has about a sixth of this
TIME_IDS = 6  # original height and width, top and left of the crop, target height and width (arXiv 2307.01952)
SCHEDULERS = (  # of diffusers, with the noise process of DDPM (arXiv 2006.11239)
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)  # of diffusers, of rectified flow (arXiv 2209.03003)
ZERO_SNR_SCHEDULERS = (  # those that know rescale_betas_zero_snr (arXiv 2305.08891)
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # never loaded, so any class is accepted
_MAX_CONTAINERS = 2**18  # lists and objects of a JSON file; the largest file, that of Qwen3's tokenizer, has about 152,000


def unusable_base(got: str, expected: str) -> ImagicError:
    """The error for a base that cannot be used."""
    return ImagicError(got, expected, "download the base again, or choose another base")


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Converts every exception raised inside into an ImagicError that names ``path``, the file or folder that a library reads."""
    try:
        yield
    except ImagicError:
        raise
    except Exception as error:  # the libraries raise anything for a broken file
        first_line = next(iter(str(error).splitlines()), "")[:300]
        raise unusable_base(
            f"{path} cannot be loaded ({type(error).__name__}: {first_line!r})", "files as diffusers writes them"
        ) from error


def read_text(path: Path, limit: int = 2**20) -> str:
    """Text of a file. Symbolic links are followed.

    Args:
        path: the file.
        limit: maximum size in bytes.

    Raises:
        ImagicError: the path is not a regular file; the file is larger than the limit or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ValueError("not a file")
        if (size := path.stat().st_size) > limit:
            raise ValueError(f"over {limit:,} bytes")
        with path.open("rb") as file:
            return file.read(size).decode()  # not to its end, which a file of the kernel may not have
    except (OSError, ValueError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "a file in diffusers' format") from error


def read_json(path: Path, limit: int = 2**20) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path: the file.
        limit: maximum size in bytes.

    Raises:
        ImagicError: as :func:`read_text`; the text is not JSON or not an object; it has a duplicate key or a number that is not finite; it
            has too many or too deeply nested lists and objects.
    """
    text = read_text(path, limit)
    try:
        if (containers := text.count("[") + text.count("{")) > _MAX_CONTAINERS:
            raise ValueError(f"{containers:,} lists and objects, more than {_MAX_CONTAINERS:,}")
        content = parsed_json(text)
    except (ValueError, RecursionError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "JSON as diffusers writes it") from error
    return content


def parsed_json(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text; raises ValueError or RecursionError for anything else, and for duplicate keys, NaN and infinity."""
    content = json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite_number, parse_constant=_finite_number)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not an object")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of ``json.loads`` that raises ValueError for a key that occurs twice."""
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a duplicate key")
    return content


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is not finite")
    return number


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Header of a safetensors file: the tensors' entries by name, and the metadata. Tensor data are not read.

    Raises:
        ImagicError: the file is a pickle, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER and start.startswith((b"PK\x03\x04", b"\x80")):  # the length of a valid header can start with 0x80 too
                raise ImagicError(
                    f"{path} is a pickle, which can run code when it is loaded", "a safetensors file, whatever its extension",
                    "look for a .safetensors file of the same checkpoint, or convert it on a machine where you trust it",
                )  # fmt: skip
            if not 2 <= length <= MAX_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            tensors = parsed_json(file.read(length))
        metadata = tensors.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are not strings")
    except (OSError, ValueError, RecursionError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "a safetensors file") from error
    return tensors, metadata


def read_index(folder: Path) -> dict[str, Any]:
    """Content of ``model_index.json``, after a check of the classes it names. A class from elsewhere could be code that the base contains.

    Raises:
        ImagicError: the pipeline class is not supported; a component has another class than the supported one; a component is unknown.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    family = index.get("_class_name")
    known = FAMILIES | FLOW_FAMILIES
    if not isinstance(family, str) or family not in known:
        got = f"{folder} has the pipeline class {reprlib.repr(family)}"
        raise ImagicError(got, f"one of {', '.join(known)}", "choose a base of one of these families")
    components, flow = known[family], family in FLOW_FAMILIES
    if components is _JOINT_COMPONENTS and index.get("text_encoder") == ["transformers", "CLIPTextModel"]:
        absent = [part for part in components if "text_encoder" in part or "tokenizer" in part if part not in _CLIP_COMPONENTS]
        if more := [part for part in absent if index.get(part) not in (None, [None, None])]:
            raise unusable_base(f"{path} has {', '.join(more)} beside a CLIPTextModel", "CLIPTextModelWithProjection as text_encoder")
        components = {part: kinds for part, kinds in components.items() if part not in absent} | _CLIP_COMPONENTS
    for part, (library, classes) in components.items():
        if part in OPTIONAL and all(index.get(one) in (None, [None, None]) for one in OPTIONAL):
            continue
        if index.get(part) not in [[library, name] for name in classes]:
            raise unusable_base(f"{path} has {reprlib.repr(index.get(part))} as {part}", f"{' or '.join(classes)} of {library}")
    scheduler = index.get("scheduler")
    if not (isinstance(scheduler, list) and len(scheduler) == 2 and scheduler[0] == "diffusers" and isinstance(scheduler[1], str)):
        raise unusable_base(f"{path} has {reprlib.repr(scheduler)} as scheduler", "a scheduler of diffusers")
    if scheduler[1] not in (schedulers := FLOW_SCHEDULERS if flow else SCHEDULERS):
        process = "rectified flow" if flow else "DDPM"
        got = f"{path} has the scheduler {scheduler[1][:60]!r}, whose noise process is not known to be that of {process}"
        raise ImagicError(got, f"one of {', '.join(schedulers)}", "choose another base")
    allowed = {*components, "scheduler", *_UNUSED}
    for name, value in index.items():
        if name not in allowed and not name.startswith("_") and isinstance(value, (list, dict)) and value != [None, None]:
            raise unusable_base(f"{path} has a component {reprlib.repr(name)}", f"only {', '.join(sorted(allowed))}")
    check_keys(path, keys_of(index)["model_index"], index)
    for name in ("force_zeros_for_empty_prompt", "is_distilled"):
        if not isinstance(value := index.get(name), (bool, type(None))):
            raise unusable_base(f"{path} has {name} = {reprlib.repr(value)}", "true or false")
    return index


def inpainting_channels(latent_channels: int) -> int:
    """Input channels of the U-Net of an inpainting model: noisy latents, the mask, and the latents of the photo without the masked area."""
    return 2 * latent_channels + 1


def keys_of(index: Mapping[str, Any]) -> Mapping[str, Keys]:
    """The keys that the configs of a base can have, by component, for the content of its checked ``model_index.json``."""
    components = FLOW_FAMILIES.get(index["_class_name"])
    return KEYS if components is None else KLEIN_KEYS if components is _KLEIN_COMPONENTS else SD3_KEYS
