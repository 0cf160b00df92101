"""What a base from a stranger may say: its JSON is read and checked here before any library sees it. No torch, no diffusers."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import ImagicError

_COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
_SECOND: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": _COMPONENTS["tokenizer"],
}
FAMILIES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # the components of each kind of pipeline
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline"), _COMPONENTS),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), _COMPONENTS | _SECOND),
}
MAX_HEADER = 2**22  # bytes of a safetensors header; that of Stable Diffusion XL in a single file has a sixth
TIME_IDS = 6  # height and width of the original, top and left of the crop, height and width of the picture (arXiv 2307.01952)
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # never loaded, so they may be anything
_REQUIRED = {
    "unet": ("sample_size", "in_channels", "out_channels", "cross_attention_dim", "layers_per_block", "block_out_channels"),
    "vae": ("sample_size", "latent_channels", "layers_per_block", "block_out_channels"),
    "text_encoder": (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    ),
}  # fmt: skip
_REQUIRED["text_encoder_2"] = (*_REQUIRED["text_encoder"], "projection_dim")
_LISTS = ("block_out_channels", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads")
_SIZES = {name for names in _REQUIRED.values() for name in names} | {*_LISTS, "norm_num_groups", "num_train_timesteps"}
_SIZES |= {"addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"}
_NUMBERS = ("scaling_factor", "norm_eps", "layer_norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor")
_WHOLE = ("freq_shift", "downsample_padding", "bos_token_id", "eos_token_id", "pad_token_id")
_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")  # nobody gives these
_MOST = {"layers_per_block": 4, "transformer_layers_per_block": 10, "reverse_transformer_layers_per_block": 10, "num_hidden_layers": 64}
_MOST_BLOCKS = 6
_MOST_PARTS = 2**17  # of a JSON file; the largest, a tokenizer's, has 49,000


def unusable_base(got: str, expected: str) -> ImagicError:
    """What is said of a base that cannot be used."""
    return ImagicError(got, expected, "download the base again, or choose another")


@contextmanager
def library_errors(what: Path) -> Iterator[None]:
    """Whatever a library says to a stranger's file, the file is to blame."""
    try:
        yield
    except ImagicError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:300]
        raise unusable_base(f"{what} makes nothing ({type(error).__name__}: {first!r})", "what diffusers writes") from error


def read_text(path: Path, limit: int = 2**20) -> str:
    """The text of a file, links followed.

    Args:
        limit: bytes.

    Raises:
        ImagicError: no regular file, longer than the limit, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with path.open("rb") as file:
            found = file.read(limit + 1)
        if len(found) > limit:
            raise ValueError(f"over {limit:,} bytes")
        return found.decode()
    except (OSError, ValueError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "a file in diffusers' own format") from error


def read_json(path: Path, limit: int = 2**20) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ImagicError: as :func:`read_text`; not JSON, not an object, a key twice, a number that is not finite, too many or too deep lists.
    """
    text = read_text(path, limit)
    try:
        if (parts := text.count("[") + text.count("{")) > _MOST_PARTS:
            raise ValueError(f"{parts:,} lists and objects")
        found = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "JSON as diffusers writes it") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text}")
    return number


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors that a safetensors file says it holds, by name, and its metadata.

    Raises:
        ImagicError: it is a pickle, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER and start.startswith((b"PK\x03\x04", b"\x80")):  # a length may begin so, too
                raise ImagicError(
                    f"{path} is a pickle, which can run code on whoever reads it", "safetensors, whatever its name",
                    "look for a .safetensors file of the same checkpoint, or convert it where you trust it",
                )  # fmt: skip
            if not 2 <= length <= MAX_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            found = json.loads(file.read(length), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}, not an object")
        said = found.pop("__metadata__", {})
        if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
            raise ValueError("metadata that is no text")
    except (OSError, ValueError, RecursionError) as error:
        raise unusable_base(f"{path} cannot be read ({error})", "a safetensors file") from error
    return found, said


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json``, if its family is known, every component is of the one class that is supported, and none is unknown.

    Raises:
        ImagicError: it is not so. A class from anywhere else might be code that came with the base.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    family = index.get("_class_name")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ImagicError(f"{folder} is a {reprlib.repr(family)}", f"one of {', '.join(FAMILIES)}", "choose a Stable Diffusion base")
    components = FAMILIES[family]
    for part, (library, classes) in components.items():
        if index.get(part) not in [[library, name] for name in classes]:
            raise unusable_base(f"{path} has {reprlib.repr(index.get(part))} as {part}", f"{' or '.join(classes)} of {library}")
    scheduler = index.get("scheduler")
    if not (isinstance(scheduler, list) and len(scheduler) == 2 and scheduler[0] == "diffusers" and isinstance(scheduler[1], str)):
        raise unusable_base(f"{path} has {reprlib.repr(scheduler)} as scheduler", "a scheduler of diffusers")
    known = {*components, "scheduler", *_UNUSED}
    for name, value in index.items():
        if name not in known and not name.startswith("_") and isinstance(value, (list, dict)):
            raise unusable_base(f"{path} has a component {reprlib.repr(name)}", f"none but {', '.join(sorted(known))}")
    return index


def check_sizes(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Makes sure that the components are of plausible sizes, and fit together.

    Whoever builds them afterwards on tensors without memory is done in seconds.

    Args:
        parts: the configs of ``unet``, ``vae``, ``text_encoder``, ``scheduler``, and ``text_encoder_2`` where there is one.

    Raises:
        ImagicError: they are not, or do not.
    """
    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
    second = parts.get("text_encoder_2")
    odd = [f"{part}.{name}" for part in parts for name in _REQUIRED.get(part, ()) if parts[part].get(name) is None]
    odd += [f"{part}.{name}" for part, config in parts.items() for name, value in config.items() if not _is_plausible(name, value)]
    if odd:
        raise unusable_base(
            f"{folder} gives no plausible {', '.join(repr(name[:60]) for name in odd[:5])}", "the configs of a Stable Diffusion base"
        )
    foreign = [name for name in _INPUTS if unet.get(name) is not None]
    if unet.get("addition_embed_type") != ("text_time" if second else None):
        foreign.append("addition_embed_type")
    if foreign:
        expected = "one that is told a text and sizes" if second else "one that is told a text alone"
        raise unusable_base(f"{folder} has a U-Net with {', '.join(foreign)}", expected)
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise unusable_base(f"{folder} has a VAE with latents_mean or latents_std", "latents that are scaled by one number")
    widths, down, up = unet["block_out_channels"], unet.get("down_block_types", ()), unet.get("up_block_types", ())
    for blocks, kind in ((widths, int), (down, str), (up, str), (vae["block_out_channels"], int)):
        if not isinstance(blocks, list) or not all(isinstance(one, kind) for one in blocks):
            raise unusable_base(f"{folder} has the blocks {reprlib.repr(blocks)}", "a list of their widths, or of their kinds")
    for what, found in {
        "down_block_types to block_out_channels": (len(down), len(widths)),
        "up_block_types to block_out_channels": (len(up), len(widths)),
        "out_channels to in_channels": (unet["out_channels"], unet["in_channels"]),
        "latent_channels of the VAE to in_channels of the U-Net": (vae["latent_channels"], unet["in_channels"]),
        "in_channels of the VAE to a picture": (vae.get("in_channels", 3), 3),
        "out_channels of the VAE to a picture": (vae.get("out_channels", 3), 3),
        "hidden_size of the text encoders to cross_attention_dim": (
            text["hidden_size"] + (second["hidden_size"] if second else 0),
            unet["cross_attention_dim"],
        ),
        "pooled embedding and sizes to projection_class_embeddings_input_dim": _added_condition_widths(unet, second),
    }.items():
        if found[0] != found[1]:
            raise unusable_base(f"{folder} does not fit together: {what}, {found[0]} to {found[1]}", "equal numbers")


def _added_condition_widths(unet: dict[str, Any], second: dict[str, Any] | None) -> tuple[int, int]:
    """How wide what the U-Net is told beside the tokens is, and how wide it takes it."""
    if second is None:
        return 0, 0
    told = second["projection_dim"] + TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
    return told, unet.get("projection_class_embeddings_input_dim") or 0


def _is_plausible(name: str, value: object) -> bool:
    """Whether a setting may be so. None stands for diffusers' own, and what no memory hangs on is left to diffusers."""
    most = _MOST.get(name, 2**20)
    if name in _NUMBERS:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most
    if name in _WHOLE:
        return type(value) is int and 0 <= value <= most
    if value is None:
        return True
    ones = value if isinstance(value, list) and (name in _LISTS or name not in _SIZES) else [value]
    if name in _SIZES:
        return 0 < len(ones) <= _MOST_BLOCKS and all(type(one) is int and 0 < one <= most for one in ones)
    return all(abs(one) <= most if isinstance(one, (int, float)) else not isinstance(one, list) for one in ones)
