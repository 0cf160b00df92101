"""The files of a tokenizer, without settings that could name other files, and CLIP's own vocabulary. No torch import."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from .flow_keys import KLEIN_KEYS, SD3_KEYS
from .keys import KEYS, Keys, check_keys
from .vetting import read_json, read_text, unusable_base

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt")
_NULL_PARTS = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
QWEN_START = "<|im_start|>"
"""The token that starts a message in the chat template of Qwen3."""
CHAT_TEMPLATE = "chat_template.jinja"
_QWEN3_TEMPLATE = (QWEN_START, "<|im_end|>", "add_generation_prompt", "enable_thinking", r"<think>\n\n</think>\n\n")
_MAX_BYTES = 2**24
_UNKNOWN = 2  # id of T5's unknown token


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The files in a tokenizer's folder: vetted content by file name. Missing files are left out.

    Raises:
        ImagicError: a file cannot be read, is not valid JSON, or is larger than 16 MiB; a setting is not supported.
    """
    return {name: _vetted(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}


def qwen_tokenizer_files(folder: Path) -> dict[str, str]:
    """As :func:`tokenizer_files`, of the tokenizer of Qwen3.

    Its chat template is a program (Jinja), which is not run: the family writes a prompt as Qwen3's template does without thinking. A
    template without the parts of Qwen3's is refused.

    Raises:
        ImagicError: as there; there is no chat template, or it is not that of Qwen3.
    """
    settings, place = read_json(folder / TOKENIZER_FILES[0], _MAX_BYTES), folder / CHAT_TEMPLATE
    template = read_text(place) if place.exists() else settings.get("chat_template")
    missing = [part for part in _QWEN3_TEMPLATE if not isinstance(template, str) or part not in template]
    if missing:
        got = f"{folder} has {'a' if template else 'no'} chat template{f' without {missing[0]}' if template else ''}"
        raise unusable_base(got, "the chat template of Qwen3, as FLUX.2 klein has it")
    return {
        name: _settings(folder / name, KLEIN_KEYS["tokenizer"]) if name in TOKENIZER_FILES[:2] else _vetted(folder / name)
        for name in TOKENIZER_FILES
        if (folder / name).exists()
    }


def t5_tokenizer_files(folder: Path) -> dict[str, str]:
    """As :func:`tokenizer_files`, of a T5 tokenizer: ``tokenizer.json`` holds its vocabulary, and ``spiece.model`` is not read.

    Raises:
        ImagicError: as there; there is no ``tokenizer.json``, or it is not that of T5.
    """
    path = folder / "tokenizer.json"
    content = read_json(path, _MAX_BYTES)
    model: Any = content.get("model")
    if not isinstance(model, dict) or model.get("type", "Unigram") != "Unigram" or model.get("unk_id") != _UNKNOWN:
        raise unusable_base(f"{path} is not the tokenizer of T5", f"a Unigram model whose unknown token has the id {_UNKNOWN}")
    for part in ("padding", "truncation"):
        if (direction := (content.get(part) or {}).get("direction", "Right")) != "Right":
            raise unusable_base(f"{path} has {part} with the direction {str(direction)[:20]!r}", "Right, as every T5 tokenizer")
    # transformers rebuilds the other parts, which are fixed; of the normalizer it reads the table of characters
    vetted = _NULL_PARTS | {
        "added_tokens": content.get("added_tokens", []),
        "normalizer": _characters(path, content.get("normalizer")),
        "model": {"type": "Unigram", "unk_id": _UNKNOWN, "vocab": model.get("vocab"), "byte_fallback": False},
    }
    return {"tokenizer.json": json.dumps(vetted)} | {
        name: _settings(folder / name, SD3_KEYS["tokenizer_3"]) for name in TOKENIZER_FILES[:2] if (folder / name).exists()
    }


def _characters(path: Path, normalizer: Any) -> dict[str, Any] | None:
    """The table of characters of a normalizer; None if there is none.

    Raises:
        ImagicError: the normalizer does something else, which transformers would leave out.
    """
    parts = (normalizer or {}).get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    if normalizer is not None and [part.get("type") if isinstance(part, dict) else None for part in parts] != ["Precompiled"]:
        raise unusable_base(f"{path} has another normalizer than T5", "a table of characters (Precompiled) alone")
    table = parts[0].get("precompiled_charsmap") if parts else None
    return {"type": "Precompiled", "precompiled_charsmap": table} if isinstance(table, str) and table else None


def shipped_tokenizer() -> dict[str, str]:
    """The files of a tokenizer with CLIP's own vocabulary: content by file name.

    The vocabulary is, in this order: one symbol for each byte, the same symbols at the end of a word, one entry for each merge, and the
    start and end tokens.
    """
    merges = gzip.decompress((Path(__file__).parent / "vocabulary" / "merges.txt.gz").read_bytes()).decode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other_bytes = [byte for byte in range(256) if byte not in printable]
    symbols = [*map(chr, printable), *(chr(256 + k) for k in range(len(other_bytes)))]
    merged = ["".join(pair.split()) for pair in merges.splitlines()]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, start, end]
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "model_max_length": 77}
    return {
        "vocab.json": json.dumps({token: k for k, token in enumerate(vocabulary)}),
        "merges.txt": f"#version: 0.2\n{merges}",
        "tokenizer_config.json": json.dumps(settings),
    }


def _vetted(path: Path) -> str:
    """Content of a tokenizer's file, reduced to the keys that are known to be harmless."""
    if path.suffix == ".txt":
        return read_text(path, _MAX_BYTES)
    content = read_json(path, _MAX_BYTES)
    if path.name == "tokenizer.json":  # transformers rebuilds the other parts of a CLIP or Qwen tokenizer, which are fixed
        model = content["model"]
        for part in ("padding", "truncation"):
            if (direction := (content.get(part) or {}).get("direction", "Right")) != "Right":
                raise unusable_base(
                    f"{path} has {part} with the direction {str(direction)[:20]!r}", "Right, as every tokenizer of this kind"
                )
        content = _NULL_PARTS | {
            "added_tokens": content["added_tokens"],
            "model": {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]},
        }
    elif path.name in TOKENIZER_FILES[:2]:
        return _settings(path, KEYS["tokenizer"])
    return json.dumps(content)


def _settings(path: Path, keys: Keys) -> str:
    """Content of a tokenizer's settings, reduced to the honoured keys."""
    content = read_json(path, _MAX_BYTES)
    check_keys(path, keys, content)
    return json.dumps({name: value for name, value in content.items() if name in keys.honoured})
