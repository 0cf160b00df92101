"""Checks JSON files and safetensors headers of untrusted bases before any library reads them. No torch or diffusers import."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError
from .flow_keys import SD3_KEYS
from .keys import KEYS, check_keys

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
FAMILIES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # library and classes of each component, by pipeline class
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline"), _COMPONENTS),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), _COMPONENTS | _SECOND_TEXT_ENCODER),
}
FLOW_FAMILIES = dict.fromkeys(("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"), _JOINT_COMPONENTS)  # as FAMILIES
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
_MAX_CONTAINERS = 2**17  # lists and objects of a JSON file; the largest file, that of a tokenizer, has 49,000


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
    if isinstance(family, str) and "Inpaint" in family:
        raise inpainting(f"{folder} has the pipeline class {family[:60]!r}")
    known = FAMILIES | FLOW_FAMILIES
    if not isinstance(family, str) or family not in known:
        got = f"{folder} has the pipeline class {reprlib.repr(family)}"
        raise ImagicError(got, f"one of {', '.join(known)}", "choose a Stable Diffusion base")
    components, flow = known[family], family in FLOW_FAMILIES
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
        if name not in allowed and not name.startswith("_") and isinstance(value, (list, dict)):
            raise unusable_base(f"{path} has a component {reprlib.repr(name)}", f"only {', '.join(sorted(allowed))}")
    check_keys(path, (SD3_KEYS if flow else KEYS)["model_index"], index)
    if not isinstance(zeros := index.get("force_zeros_for_empty_prompt"), (bool, type(None))):
        raise unusable_base(f"{path} has force_zeros_for_empty_prompt = {reprlib.repr(zeros)}", "true or false")
    return index


def inpainting(got: str) -> ImagicError:
    """The error for an inpainting model, whose U-Net has the mask and the masked photo as inputs."""
    remedy = "choose the base that it was made from: method blended-latent edits inside a mask with any base"
    return ImagicError(f"{got}, as an inpainting model has", "a text-to-image base", remedy)
<<<<<<< HEAD
=======


def check_sizes(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Checks that the sizes of the components are plausible and match each other.

    The limits ensure that building the components on the meta device takes seconds at most.

    Args:
        folder: folder of the base, for messages.
        parts: configs of ``unet``, ``vae``, ``text_encoder``, ``scheduler``, and ``text_encoder_2`` if there is one.

    Raises:
        ImagicError: a required setting is missing; a setting is implausible; the U-Net has unsupported inputs; sizes do not match.
    """
    unet, vae = parts["unet"], parts["vae"]
    if missing := [f"{part}/config.json: {name}" for part in parts for name in _REQUIRED.get(part, ()) if parts[part].get(name) is None]:
        got = f"{folder} does not state sizes of the model ({', '.join(missing)})"
        remedy = "add them to these files, with the sizes of the weights, or download the base again"
        raise ImagicError(got, "configs with all sizes: defaults of diffusers may not be those of these weights", remedy)
    if problems := [f"{part}.{name}" for part, config in parts.items() for name, value in config.items() if not _is_plausible(name, value)]:
        names = ", ".join(repr(name[:60]) for name in problems[:5])
        raise unusable_base(f"{folder} has implausible settings: {names}", "the configs of a Stable Diffusion base")
    _check_inputs(folder, unet, has_second=parts.get("text_encoder_2") is not None)
    block_lists = (
        (unet["block_out_channels"], int), (unet.get("down_block_types", ()), str),
        (unet.get("up_block_types", ()), str), (vae["block_out_channels"], int),
    )  # fmt: skip
    for blocks, item_type in block_lists:
        if not isinstance(blocks, list) or not all(isinstance(block, item_type) for block in blocks):
            raise unusable_base(f"{folder} has the blocks {reprlib.repr(blocks)}", "a list of channel counts or of block types")
    _check_matching(folder, unet, vae, parts["text_encoder"], parts.get("text_encoder_2"))


def _check_inputs(folder: Path, unet: dict[str, Any], has_second: bool) -> None:
    """Raises ImagicError if the U-Net has added conditions that its family does not have, or lacks those that it has."""
    added = unet.get("addition_embed_type")
    if added != ("text_time" if has_second else None):
        expected = "text_time, for pooled embedding and size ids" if has_second else "none: the U-Net is conditioned on text only"
        raise unusable_base(f"{folder} has a U-Net with the addition_embed_type {reprlib.repr(added)}", expected)


def _check_matching(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], second: dict[str, Any] | None) -> None:
    """Raises ImagicError if two sizes differ that must be equal."""
    if unet["in_channels"] == 2 * vae["latent_channels"] + 1:  # latents, mask and masked photo
        raise _inpainting(f"{folder} has a U-Net with in_channels = {unet['in_channels']}")
    channels, text_width = len(unet["block_out_channels"]), text["hidden_size"] + (second["hidden_size"] if second else 0)
    pairs = {
        "numbers of down_block_types and block_out_channels": (len(unet["down_block_types"]), channels),
        "numbers of up_block_types and block_out_channels": (len(unet["up_block_types"]), channels),
        "out_channels and in_channels of the U-Net": (unet["out_channels"], unet["in_channels"]),
        "latent_channels of the VAE and in_channels of the U-Net": (vae["latent_channels"], unet["in_channels"]),
        "in_channels of the VAE and channels of an RGB image": (vae.get("in_channels", 3), 3),
        "out_channels of the VAE and channels of an RGB image": (vae.get("out_channels", 3), 3),
        "hidden_size of the text encoders and cross_attention_dim": (text_width, unet["cross_attention_dim"]),
        "size of the added conditions and projection_class_embeddings_input_dim": _added_condition_sizes(unet, second),
    }
    for names, (first_size, second_size) in pairs.items():
        if first_size != second_size:
            raise unusable_base(f"{folder} has configs that do not match: {names}, {first_size} and {second_size}", "equal sizes")


def _added_condition_sizes(unet: dict[str, Any], second: dict[str, Any] | None) -> tuple[int, int]:
    """Size of pooled embedding plus embedded size ids, and the size that the U-Net's config expects for them; zeros without them."""
    if second is None:
        return 0, 0
    actual = second["projection_dim"] + TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
    return actual, unet.get("projection_class_embeddings_input_dim") or 0


def _is_plausible(name: str, value: object) -> bool:
    """Whether a setting has a plausible type and value.

    None stands for the default of diffusers. Settings that affect no tensor size are only checked for huge numbers and nested lists:
    diffusers checks the rest.
    """
    limit = _MAX_VALUES.get(name, _MAX_VALUE)
    if name in _NUMBERS:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= limit
    if name in _INTEGERS:
        return type(value) is int and 0 <= value <= limit
    if value is None:
        return True
    items = value if isinstance(value, list) and (name in _LISTS or name not in _SIZES) else [value]
    if name in _SIZES:
        return 0 < len(items) <= _MAX_BLOCKS and all(type(item) is int and 0 < item <= limit for item in items)
    return all(abs(item) <= limit if isinstance(item, (int, float)) else not isinstance(item, list) for item in items)
>>>>>>> tidy
