"""Every key of the configs of diffusers and transformers is honoured, harmless or refused by its name."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import diffusers
import pytest
import torch
from common import each, opened
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import save_tiny_sdxl
from transformers import CLIPTextConfig, CLIPTokenizer, GenerationConfig, PretrainedConfig

from imagic_lora.bases.loading.keys import KEYS
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.bases.loading.vetting import FAMILIES, SCHEDULERS
from imagic_lora.core.errors import ImagicError

FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "model_index": "model_index.json",
}


def arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments of a function."""
    return {name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")}


def of_schedulers() -> set[str]:
    """Arguments of every supported scheduler; from its source, because some classes need packages that are not installed."""
    names: set[str] = set()
    for path in (Path(diffusers.__file__).parent / "schedulers").glob("scheduling_*.py"):
        for part in ast.parse(path.read_text()).body:
            if isinstance(part, ast.ClassDef) and part.name in SCHEDULERS:
                made = next(one for one in part.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
                names |= {argument.arg for argument in made.args.args if argument.arg != "self"}
    return names


def popped(*functions: Any) -> set[str]:
    """Names that constructors of transformers read from their keyword arguments; those with an underscore are not stored in files."""
    names: set[str] = set()
    for function in functions:
        for call in ast.walk(ast.parse(dedent(inspect.getsource(function)))):
            match call:
                case ast.Call(ast.Attribute(ast.Name("kwargs"), "pop" | "get"), [ast.Constant(str(name)), *_]) if not name.startswith("_"):
                    names.add(name)
                case _:
                    pass
    return names


def of_text_encoders() -> set[str]:
    """Fields of a text encoder's config, what every config of transformers may hold, and the settings of generated texts."""
    every = {one.name for one in fields(CLIPTextConfig)} | popped(PretrainedConfig.__post_init__)
    return every | set(GenerationConfig._get_default_generation_params())  # pyright: ignore[reportAttributeAccessIssue]


def of_tokenizers() -> set[str]:
    """Arguments of a tokenizer and of its parent classes, and the special tokens."""
    made: list[Any] = [one.__init__ for one in CLIPTokenizer.__mro__ if "__init__" in vars(one) and one is not object]
    return arguments(CLIPTokenizer.__init__) | popped(*made) | set(CLIPTokenizer.SPECIAL_TOKENS_ATTRIBUTES)


KNOWN: dict[str, Callable[[], set[str]]] = {
    "unet": lambda: arguments(UNet2DConditionModel.__init__),
    "vae": lambda: arguments(AutoencoderKL.__init__),
    "text_encoder": of_text_encoders,
    "tokenizer": of_tokenizers,
    "scheduler": of_schedulers,
    "model_index": lambda: set().union(*(arguments(getattr(diffusers, name).__init__) for name in FAMILIES)),
}


@each("part", list(KEYS))
def test_every_key_is_in_one_list(part: str) -> None:
    """A key that a new version of diffusers or transformers adds fails here until somebody sorts it into KEYS."""
    keys, known = KEYS[part], KNOWN[part]()
    lists = [keys.honoured, keys.harmless, frozenset(keys.refused)]
    assert len(known) > 10
    assert known - frozenset().union(*lists) == set()
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


@each("part", ["unet", "vae", "scheduler"])
def test_what_a_class_honours_is_its_argument(part: str) -> None:
    """No key is called honoured that the class would not take."""
    assert KEYS[part].honoured <= KNOWN[part]()


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with both text encoders."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("keys") / "base")


def said(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a base with other values in one of its JSON files."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


UNHEARD = [(FILES[part], name, "x" if value != "x" else "y") for part, keys in KEYS.items() for name, value in keys.refused.items()] + [
    (file, "a_setting_of_tomorrow", 0.5) for file in (*FILES.values(), "tokenizer_2/tokenizer_config.json", "text_encoder_2/config.json")
]


@each("file, name, value", UNHEARD)
def test_a_setting_that_nothing_honours_is_refused_by_its_name(sdxl: Path, tmp_path: Path, file: str, name: str, value: Any) -> None:
    """With its file; the plan refuses it too, unless it belongs to a tokenizer, which a plan does not read."""
    base = said(sdxl, tmp_path / "base", file, **{name: value})
    with pytest.raises(ImagicError, match=rf"{file} has {name} = .*, which is not supported"):
        opened(base) if file.startswith("tokenizer") else architecture_of(str(base))


def test_values_without_effect_are_accepted(sdxl: Path, tmp_path: Path) -> None:
    """As versions of diffusers and transformers write them, and None for a setting of tomorrow."""
    copy = tmp_path / "base"
    shutil.copytree(sdxl, copy)
    for part, file in FILES.items():
        path = copy / file
        values = {"a_setting_of_tomorrow": None, "_private": 1, **KEYS[part].refused, **dict.fromkeys(KEYS[part].harmless - NULL, "x")}
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    one, other = opened(copy), opened(sdxl)
    assert torch.equal(one.encode_prompt("a cat").tokens, other.encode_prompt("a cat").tokens)
    assert one.fingerprint == other.fingerprint


NULL = {"safety_checker", "feature_extractor", "image_encoder", "sample_size"}  # components, and a size that is checked


@each("value", ["yes", 1])
def test_a_switch_of_the_index_is_true_or_false(sdxl: Path, tmp_path: Path, value: Any) -> None:
    """Anything else would count as false here and as true in diffusers."""
    with pytest.raises(ImagicError, match=r"force_zeros_for_empty_prompt = .*true or false"):
        architecture_of(str(said(sdxl, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=value)))


@each("part", ["padding", "truncation"])
def test_a_tokenizer_that_pads_or_cuts_on_the_left_is_refused(sdxl: Path, tmp_path: Path, part: str) -> None:
    """transformers would do it."""
    with pytest.raises(ImagicError, match=f"{part} with the direction 'Left'"):
        opened(said(sdxl, tmp_path / "base", "tokenizer/tokenizer.json", **{part: {"direction": "Left"}}))
