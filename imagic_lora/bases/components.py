"""The components of a folder in diffusers' format, made of vetted JSON and safetensors alone.

diffusers' and transformers' own loaders are kept away from the folder: they follow what its files say to other files, other bases, other
libraries. Here the classes are fixed, and nothing in the folder names what is run or read.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel, schedulers
from diffusers.models.modeling_utils import no_init_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..errors import ImagicError
from .blueprint import text_parameters
from .files import finite, tensors
from .vetting import read_json, read_text, refused

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt")
_TOKENIZER_SETTINGS = (  # of the first two; others could name files
    "bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
    "model_max_length", "clean_up_tokenization_spaces", "add_prefix_space", "do_lower_case", "errors",
)  # fmt: skip
_NO_PARTS = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
_TOKENIZER_BYTES = 2**23
_PROBE = "a1~\u4e00"  # characters that not every vocabulary has


@contextmanager
def library_on(what: Path) -> Iterator[None]:
    """Whatever a library says to a stranger's file, the file is to blame."""
    try:
        yield
    except ImagicError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:300]
        raise refused(f"{what} makes nothing ({type(error).__name__}: {first!r})", "what diffusers writes") from error


def model(
    kind: type[UNet2DConditionModel] | type[AutoencoderKL], config: dict[str, Any], folder: Path, part: str, dtype: torch.dtype
) -> Any:
    """A U-Net or a VAE, whose weights are exactly those that its config asks for.

    Raises:
        ImagicError: they are not, or cannot be read.
    """
    with library_on(folder / part), torch.device("meta"), no_init_weights():
        made: Any = kind.from_config(config)
    state = tensors(folder, part)
    made._fix_state_dict_keys_on_load(state)  # names of diffusers' early days, which the VAE of Stable Diffusion 1.5 has
    _same(
        {name: value.shape for name, value in made.state_dict().items()},
        {name: value.shape for name, value in state.items()},
        folder / part,
    )
    made.load_state_dict(finite(state, dtype, folder / part), assign=True)
    if any(one.is_meta for one in made.buffers()):
        raise refused(f"{folder / part} has parts that no file holds", "a U-Net or VAE of Stable Diffusion")
    return made


def _same(asked: dict[str, torch.Size], held: dict[str, torch.Size], where: Path) -> None:
    missing, extra = sorted(asked.keys() - held.keys()), sorted(held.keys() - asked.keys())
    shapes = [name for name in asked if name in held and asked[name] != held[name]]
    for names, what in ((missing, "are missing"), (extra, "are not in its config"), (shapes, "are not of the shape in its config")):
        if names:
            raise refused(f"{len(names)} tensors of {where} {what}, {names[0][:80]!r} among them", "the weights that the config describes")


def text_encoder(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """The text encoder; transformers is given the weights and no file.

    Raises:
        ImagicError: as :func:`model`.
    """
    where, state = folder / "text_encoder", tensors(folder, "text_encoder")
    held, asked = sum(value.numel() for value in state.values()), text_parameters(config)
    if held != asked:
        raise refused(f"{where} holds {held:,} weights", f"the {asked:,} that its config describes")
    with library_on(where):
        loaded: Any = CLIPTextModel.from_pretrained(
            None, config=CLIPTextConfig(**config), state_dict=finite(state, dtype, where), dtype=dtype, output_loading_info=True
        )
    made, told = loaded
    if any(told.values()):
        odd = next(name for names in told.values() for name in names)
        raise refused(
            f"the tensors of {where} are not those of a CLIP text encoder: {str(odd)[:80]!r}", "the weights that the config describes"
        )
    return made


def tokenizer(text: dict[str, Any], folder: Path) -> CLIPTokenizer:
    """The tokenizer, read from a copy that holds what was vetted and nothing else.

    Args:
        text: config of the text encoder, which it has to fit.

    Raises:
        ImagicError: it cannot be read, or gives what the text encoder cannot take.
    """
    where = folder / "tokenizer"
    with TemporaryDirectory() as copy, library_on(where):
        for name in TOKENIZER_FILES:
            if (where / name).exists():
                Path(copy, name).write_text(_vetted(where / name), encoding="utf-8")
        made = CLIPTokenizer.from_pretrained(copy, local_files_only=True)
        length = made.model_max_length = min(made.model_max_length, text["max_position_embeddings"])
        ids = made(_PROBE, padding="max_length", max_length=length, truncation=True).input_ids
        highest = max(made.get_vocab().values())
    if len(ids) != length or length < 3 or ids[0] != made.bos_token_id:
        raise refused(f"{where} reads {length} tokens, the first of them {ids[:1]}", "a tokenizer of CLIP")
    if highest >= text["vocab_size"]:
        raise refused(f"{where} has a token {highest}", f"numbers below the {text['vocab_size']} that the text encoder knows")
    return made


def _vetted(path: Path) -> str:
    if path.suffix == ".txt":
        return read_text(path, _TOKENIZER_BYTES)
    found = read_json(path, _TOKENIZER_BYTES)
    if path.name == "tokenizer.json":  # of its parts transformers makes those anew that are left out here, a CLIP tokenizer's being fixed
        model = found["model"]
        found = _NO_PARTS | {
            "added_tokens": found["added_tokens"],
            "model": {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]},
        }
    elif path.name in TOKENIZER_FILES[:2]:
        found = {name: found[name] for name in _TOKENIZER_SETTINGS if name in found}
    return json.dumps(found)


def scheduler(name: str, config: dict[str, Any], folder: Path) -> Any:
    """The scheduler of that name, which has been seen to make a schedule.

    Raises:
        ImagicError: diffusers has none of that name, or the config is none of it.
    """
    where = folder / "scheduler"
    with library_on(where):
        kind: Any = getattr(schedulers, name, None)
        if not _is_scheduler(kind):
            raise refused(f"{folder} has a scheduler {reprlib.repr(name)}", "one of diffusers whose libraries are installed")
        tried = kind.from_config(config)
        tried.set_timesteps(min(10, tried.config.num_train_timesteps))
        training: Any = DDPMScheduler.from_config(dict(tried.config))
        kept = training.alphas_cumprod
        if len(kept) != tried.config.num_train_timesteps or not bool(((kept >= 0) & (kept <= 1)).all()):
            raise refused(f"{where} has betas that make no noise", "betas between 0 and 1, one for each timestep")
        return kind.from_config(config)


def _is_scheduler(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)
